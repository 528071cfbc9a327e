"""Find the linear layers of a model whose weight gradients can be added within their products, or say why not."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


class FusableLayers(NamedTuple):
    """Linear layers of a model.

    Attributes:
        layers: Those that can be fused, with their weights.
        reasons: Why others cannot, by name. Layers that are not trained are in neither.
    """

    layers: list[tuple[nn.Linear, Tensor]]
    reasons: dict[str, str]


def find_fusable_layers(model: nn.Module, parameters: Iterable[Tensor]) -> FusableLayers:
    """Find the linear layers with trained weights.

    Args:
        model: All its modules are looked at.
        parameters: Those that are trained, if they require a gradient.
    """
    trained = {parameter for parameter in parameters if parameter.requires_grad}
    owners = Counter(parameter for module in model.modules() for parameter in module._parameters.values())
    found = FusableLayers([], {})
    for name, module in model.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        if weight is None or weight not in trained:
            continue
        assert isinstance(module, nn.Linear)
        reason = _obstacle(module, weight, owners[weight])
        if reason is None:
            found.layers.append((module, weight))
        else:
            found.reasons[name] = reason
    return found


def copied_bytes(model: nn.Module, parameters: Iterable[Tensor]) -> int:
    """Return the memory of narrow copies of all float32 weights of fusable layers."""
    layers = find_fusable_layers(model, parameters).layers
    return sum(2 * weight.numel() for _, weight in layers if weight.dtype is torch.float32)


def _obstacle(module: nn.Linear, weight: Tensor, num_owners: int) -> str | None:
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, and not exactly an nn.Linear"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in _DTYPES:
        return f"its weight is in {str(weight.dtype).removeprefix('torch.')}"
    if num_owners > 1:
        return "its weight is tied to that of another module"
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return "a hook waits for the gradient of its weight"
    return None
