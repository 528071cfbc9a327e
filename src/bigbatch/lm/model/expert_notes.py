"""Notes about mixture-of-experts models: whether their load-balancing loss is trained, and what is left out.

model → load-balancing loss of its configuration, LoRA adapters on experts and routers → sentences for the user
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.model.expert_balance import NUM_EXPERTS, own_coefficient
from bigbatch.lm.model.load_balancing import LoadBalancedLoss
from bigbatch.lm.text import plural

_BALANCING = re.compile(r"(router_)?(aux|z)_loss_(coeff?|alpha|weight|factor)|moe_loss_weight|load_balanc\w*_\w+")
ROUTER = re.compile(r"(^|[._])(gate|router)(\.layer)?(\.base_layer)?\.weight$")


def expert_notes(model: Any, config: TrainConfig, balanced: LoadBalancedLoss | None) -> list[str]:
    """Return how a run trains a mixture of experts, and what it leaves out; empty for a model without experts.

    Args:
        model: A transformers language model, or peft's wrapper of one.
        config: Of the run.
        balanced: The loss with the load-balancing loss that is trained; None without.
    """
    notes = []
    unused = ", ".join(f"{name} {value:g}" for name, value in _balancing_losses(model.config))
    if balanced is not None:
        notes.append(_trained(model, config, balanced))
    elif config.router_aux_loss_coef == 0 and own_coefficient(model) is not None:
        notes.append("the load-balancing loss of the experts is not trained, by --router-aux-loss-coef 0")
    elif unused:
        verb = "have" if ", " in unused else "has"
        notes.append(
            f"the load-balancing loss of the experts is not trained: {unused} of the model {verb} no effect, and the "
            "experts may be used unevenly"
        )
    if adapted := _adapted_experts(model):
        notes.append(adapted)
    return notes


def _trained(model: Any, config: TrainConfig, balanced: LoadBalancedLoss) -> str:
    source = "of the model" if config.router_aux_loss_coef is None else "by --router-aux-loss-coef"
    scope = (
        "over the whole batch of each update: every sequence runs one forward more (--router-aux-loss microbatch "
        "avoids it, for another loss; --router-aux-loss-coef 0 leaves the loss out)"
        if balanced.scope == "global"
        else "over each micro-batch, as asked: its gradient depends on the micro-batch"
    )
    frozen = any(
        ROUTER.search(name) and ".base_layer." not in name and not parameter.requires_grad
        for name, parameter in model.named_parameters()
    )
    lora = "; the routers are frozen, and it trains the adapters in the layers below them" if frozen else ""
    return f"the load-balancing loss of the experts has weight {balanced.coefficient:g} {source}, {scope}{lora}"


def _balancing_losses(config: Any) -> Iterator[tuple[str, float]]:
    """Yield the names and values of the coefficients of auxiliary losses of the experts that are not 0."""
    configs = [config.get_text_config(), *(part for part in vars(config).values() if hasattr(part, "model_type"))]
    for part in configs:
        counts = [getattr(part, name) for name in NUM_EXPERTS if isinstance(getattr(part, name, None), int)]
        if counts and max(counts) < 2:
            continue
        for name, value in sorted(vars(part).items()):
            if _BALANCING.fullmatch(name) and isinstance(value, int | float) and value > 0:
                yield name, value


def _adapted_experts(model: Any) -> str | None:
    """Return which expert weights, routers and other layers have LoRA adapters; None without experts or adapters."""
    names = {name: parameter.ndim for name, parameter in model.named_parameters() if parameter.ndim > 1}
    if not any(".lora_" in name for name in names):
        return None
    weights = [name for name in names if ".lora_" not in name and "bias" not in name]
    routers = [name for name in weights if ROUTER.search(name)]
    experts = [name for name in weights if ("expert" in name or names[name] > 2) and name not in routers]
    if not experts:
        return None
    head = model.get_output_embeddings()
    linear = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name
    ]
    others = [name for name in linear if name not in experts and name not in routers]
    kinds = (("expert weight", experts), ("router", routers), ("other linear layer", others))
    shares = [(sum(".base_layer." in name for name in group), len(group), kind) for kind, group in kinds if group]
    listed = [f"{adapted:,} of {plural(total, kind)}" for adapted, total, kind in shares]
    rest = "" if all(adapted == total for adapted, total, _ in shares) else "; those without adapters are not trained"
    return f"LoRA adapts {', '.join(listed[:-1])} and {listed[-1]}{rest}"
