"""Which narrow weights a loss reads otherwise than in a linear layer under autocast: they become float32 again."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

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
    seen: set[Any] = {loss.grad_fn}
    todo: list[Any] = [] if loss.grad_fn is None else [loss.grad_fn]
    while todo:
        node = todo.pop()
        for child, _ in node.next_functions:
            if child is None:
                continue
            users.setdefault(child, []).append(node)
            leaf = getattr(child, "variable", None)
            if leaf is not None and leaf in wanted:
                leaves[leaf] = child
            if child not in seen:
                seen.add(child)
                todo.append(child)
    return {leaf for leaf in wanted if leaf in leaves and not all(map(_is_product(users), users[leaves[leaf]]))}


def _is_product(users: dict[Any, list[Any]]) -> Any:
    def check(node: Any) -> bool:
        name = type(node).__name__
        if name.startswith(("TBackward", "TransposeBackward")):
            return all(type(user).__name__.startswith(_PRODUCTS) for user in users[node])
        return name.startswith((*_PRODUCTS, _COMPILED))

    return check
