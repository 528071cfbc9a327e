"""Which narrow weights a loss reads otherwise than in a linear layer under autocast: they become float32 again."""

from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.compiled_modules import is_compiled
from bigbatch.gradients.graph_edges import graph_edges

_PRODUCTS = ("AddmmBackward", "MmBackward", "LinearBackward", "MkldnnLinearBackward", "_LinearBackward")
_COMPILED = "CompiledFunctionBackward"


def read_elsewhere(loss: Tensor, weights: Iterable[Tensor]) -> set[Tensor]:
    """Return the weights that are not only factors of matrix products in the graph of a loss, or not in it at all.

    Compiled code is taken to use a weight as its layer does.

    Args:
        loss: 0-d, computed with weights in bfloat16.
        weights: Leaves.
    """
    wanted = set(weights)
    users: dict[Any, list[Any]] = {}
    leaves: dict[Tensor, Any] = {}
    for node, child in graph_edges(loss):
        users.setdefault(child, []).append(node)
        leaf = getattr(child, "variable", None)
        if leaf is not None and leaf in wanted:
            leaves[leaf] = child
    return {leaf for leaf in wanted if leaf in leaves and not all(map(_is_product(users), users[leaves[leaf]]))}


@contextmanager
def uncast_weights(model: nn.Module, weights: Container[Tensor]) -> Iterator[set[Tensor]]:
    """Collect weights of layers that run inside without autocast to bfloat16; compiled code is not watched."""
    found: set[Tensor] = set()

    def look(layer: nn.Linear, _inputs: Any) -> None:
        device = layer.weight.device.type
        if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) is not torch.bfloat16:
            found.add(layer.weight)

    compiled = {part for module in model.modules() if is_compiled(module) for part in module.modules()}
    with ExitStack() as stack:
        for module in set(model.modules()) - compiled:
            if type(module) is nn.Linear and module.weight in weights:
                stack.callback(module.register_forward_pre_hook(look).remove)
        yield found


def _is_product(users: dict[Any, list[Any]]) -> Any:
    def check(node: Any) -> bool:
        name = type(node).__name__
        if name.startswith(("TBackward", "TransposeBackward")):
            return all(type(user).__name__.startswith(_PRODUCTS) for user in users[node])
        return name.startswith((*_PRODUCTS, _COMPILED))

    return check
