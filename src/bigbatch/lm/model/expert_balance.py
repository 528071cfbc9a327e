"""Whether the load-balancing loss of a model is trained, after a test that it is that of transformers.

model, --router-aux-loss-coef → coefficient → test on the model → `LoadBalancedLoss`
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigbatch.errors import InputError, first_line
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.load_balancing import LoadBalancedLoss, Scope
from bigbatch.preserve import preserved
from bigbatch.verification.tolerances import coarser_dtype, tolerance_for

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # the second of JetMoe
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
LENGTH = 6  # tokens of the test rows


@dataclass(frozen=True)
class BalancePlan:
    """The load-balancing loss that a run trains.

    Attributes:
        coefficient: Its weight, above 0.
        num_experts: Experts of each layer that has a router.
        top_k: Experts for each token.
        scope: Tokens over which the shares of the experts are computed.
    """

    coefficient: float
    num_experts: int
    top_k: int
    scope: Scope

    def loss_fn(self, loss_fn: Callable[[Any, dict[str, Tensor]], tuple[Tensor, Tensor]]) -> LoadBalancedLoss:
        """Return a loss with the term."""
        return LoadBalancedLoss(
            loss_fn,
            coefficient=self.coefficient,
            num_experts=self.num_experts,
            top_k=self.top_k,
            scope=self.scope,
        )


def balance_plan(model: Any, config: TrainConfig, device_spec: DeviceSpec) -> BalancePlan | None:
    """Decide which load-balancing loss a run trains; None for none.

    The coefficient is that of the configuration, by default that of the model. The loss is compared with the one that
    the model returns; of a model without weights (on the meta device) it is assumed to be equal.

    Args:
        model: A transformers language model on its device, without adapters.
        config: Of the run.
        device_spec: Decides about autocast and the tolerance.

    Raises:
        InputError: The configuration asks for it, and the model has no such loss.
    """
    flag = _flag(config)
    own, top_k = own_coefficient(model), _top_k(model)
    if own is None or top_k is None:
        of_dense_model = config.router_aux_loss_coef == 0 and hasattr(model.config.get_text_config(), COEFFICIENTS[0])
        if flag is None or of_dense_model:  # such as one of a family whose larger models have experts
            return None
        raise InputError(
            f"{flag} is for a mixture of experts with a load-balancing loss, and {config.model} has none. Leave it out."
        )
    coefficient = own if config.router_aux_loss_coef is None else config.router_aux_loss_coef
    if coefficient <= 0:
        return None
    num_experts = _num_experts(model)
    if model.get_input_embeddings().weight.device.type != "meta":
        found = _matches_transformers(model, device_spec, top_k)
        if isinstance(found, str):
            if flag is None:
                return None
            raise InputError(f"{flag} is not supported for {config.model}: {found}. Leave it out.")
        num_experts = found
    return BalancePlan(coefficient, num_experts, top_k, config.router_aux_loss)


def own_coefficient(model: Any) -> float | None:
    """Return the coefficient of the load-balancing loss in a model's configuration; None without such experts."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if _num_experts(base) < 2:
        return None
    parts = (base, base.config.get_text_config(), base.config)
    values = [getattr(part, name, None) for part in parts for name in COEFFICIENTS]
    return next((float(value) for value in values if isinstance(value, int | float)), None)


def run_router_hooks_eagerly(model: Any) -> None:
    """Exempt the hooks by which transformers records router logits from compilation, which would record nothing.

    Args:
        model: A model that has returned its router logits once, which installs the hooks.
    """
    for module in model.modules():
        for number, hook in list(module._forward_hooks.items()):
            names = getattr(getattr(hook, "__code__", None), "co_freevars", ())
            if "key" in names and hook.__closure__[names.index("key")].cell_contents == "router_logits":
                module._forward_hooks[number] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]


def use_float64_experts(model: Any) -> None:
    """Let a float64 model run its experts one after another: the grouped product has no float64 kernel."""
    if getattr(model.config, "_experts_implementation", None) not in (None, "eager"):
        model.set_experts_implementation("eager")


def _flag(config: TrainConfig) -> str | None:
    """Return the flag by which a configuration asks for the loss; None if none does."""
    if config.router_aux_loss_coef is not None:
        return f"--router-aux-loss-coef {config.router_aux_loss_coef:g}"
    return None if config.router_aux_loss == "global" else f"--router-aux-loss {config.router_aux_loss}"


def _num_experts(model: Any) -> int:
    config = model.config.get_text_config()
    counts = [getattr(config, name, None) for name in NUM_EXPERTS] + [getattr(model, "num_experts", None)]
    return max((count for count in counts if isinstance(count, int)), default=0)


def _top_k(model: Any) -> int | None:
    config = model.config.get_text_config()
    values = [getattr(part, "num_experts_per_tok", None) for part in (model, config)]
    return next((value for value in values if isinstance(value, int)), None)


def _matches_transformers(model: Any, device_spec: DeviceSpec, top_k: int) -> int | str:
    """Compare the loss with the ``aux_loss`` of a model, in one forward of two rows, one of them padded.

    Returns:
        The number of experts; or in a few words why the loss is not that of the model.
    """
    device = device_spec.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    input_ids = torch.arange(2 * LENGTH, device=device).reshape(2, -1) * (vocabulary - 1) // (2 * LENGTH)
    mask = torch.ones_like(input_ids)
    mask[1, LENGTH // 2 :] = 0
    outputs: list[Any] = []

    def run(model: Any, microbatch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with device_spec.autocast():
            outputs.append(model(**microbatch, use_cache=False))
        return mask.sum(), mask.sum()

    try:
        with preserved(model, parameters=False), torch.no_grad():
            model.eval()
            loss = LoadBalancedLoss(run, coefficient=1.0, num_experts=0, top_k=top_k)
            routing = loss.routing(model, {"input_ids": input_ids, "attention_mask": mask})
            own = float(outputs[0].aux_loss)
    except Exception as error:  # noqa: BLE001 - on any error, the loss is not trained, which a note says
        return first_line(error)
    dtype = coarser_dtype(outputs[0].router_logits[0].dtype, torch.float32)
    ours = float(routing.loss)
    if not abs(ours - own) <= tolerance_for(dtype) * abs(own):
        return f"its own is {own:.6g} where this one is {ours:.6g}"
    return len(routing.hits)
