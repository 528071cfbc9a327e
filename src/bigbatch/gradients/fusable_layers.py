"""Find the layers of a model whose weight gradients can be added to their sums directly, or say why not."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


class FusableLayer(NamedTuple):
    """A layer that can be fused.

    Attributes:
        module: An ``nn.Linear`` or ``nn.Embedding``.
        weight: Its weight.
        is_tied: Whether it is the weight of one of each.
    """

    module: nn.Linear | nn.Embedding
    weight: Tensor
    is_tied: bool


class FusableLayers(NamedTuple):
    """Linear layers and embeddings of a model.

    Attributes:
        layers: Those that can be fused.
        reasons: Why others cannot, by name. Layers that are not trained are in neither.
    """

    layers: list[FusableLayer]
    reasons: dict[str, str]


def find_fusable_layers(model: nn.Module, parameters: Iterable[Tensor]) -> FusableLayers:
    """Find the linear layers and embeddings with trained weights.

    Args:
        model: All its modules are looked at.
        parameters: Those that are trained, if they require a gradient.
    """
    trained = {parameter for parameter in parameters if parameter.requires_grad}
    owners: dict[Tensor, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, []).append(module)
    found = FusableLayers([], {})
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if not isinstance(module, nn.Linear | nn.Embedding) or weight is None or weight not in trained:
            continue
        reason = _obstacle(module, weight) or _obstacle_of_owners(owners[weight])
        if reason is None:
            found.layers.append(FusableLayer(module, weight, len(owners[weight]) > 1))
        else:
            found.reasons[name] = reason
    return found


def copied_bytes(model: nn.Module, parameters: Iterable[Tensor]) -> int:
    """Return the memory of narrow copies of the float32 weights of fusable linear layers."""
    layers = find_fusable_layers(model, parameters).layers
    copied = (layer.weight for layer in layers if isinstance(layer.module, nn.Linear))
    return sum(2 * weight.numel() for weight in copied if weight.dtype is torch.float32)


def _obstacle(module: nn.Linear | nn.Embedding, weight: Tensor) -> str | None:
    kind = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
    if type(module) is not kind:
        return f"it is a {type(module).__name__}, and not exactly an nn.{kind.__name__}"
    if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq or module.sparse):
        return "its max_norm, scale_grad_by_freq or sparse is set"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in _DTYPES:
        return f"its weight is in {str(weight.dtype).removeprefix('torch.')}"
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return "a hook waits for the gradient of its weight"
    return None


def _obstacle_of_owners(owners: list[nn.Module]) -> str | None:
    """Return why a weight with these owners cannot be fused: besides one owner, a linear layer and an embedding can."""
    if len(owners) == 1 or sorted(type(owner).__name__ for owner in owners) == ["Embedding", "Linear"]:
        return None
    return "its weight is tied to that of another module"
