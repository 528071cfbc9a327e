"""Signs in the autograd graph of a loss that it may not be a sum over independent samples. Reads shapes and names only.

A sign is no proof: ``F.mse_loss(outputs, targets) * targets.numel()`` is a right sum of items and contains a mean.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

MAX_NODES = 64  # from the loss backwards: the operations of the loss, not the model
MAX_CHAIN = 6  # operations of a penalty on a parameter
PAIRWISE = ("CdistBackward", "EuclideanDistBackward", "PdistBackward")
STATISTICS = tuple(f"{name}Backward" for name in ("Mean", "Var", "Std", "Softmax", "LogSoftmax", "Logsumexp"))
LAYOUT_OPERATIONS = ("TBack", "Transpose", "Permute", "ToCopy", "View")
MEAN, ACCUMULATE = 1, "AccumulateGrad"  # _saved_reduction of torch's losses; node of a leaf


def may_combine_samples(loss: Tensor) -> bool:
    """Return whether the last operations of a loss look like a mean, a penalty, or a comparison of samples.

    Args:
        loss: 0-d, with its graph.
    """
    seen, todo = {loss.grad_fn}, [loss.grad_fn]
    while todo and len(seen) <= MAX_NODES:
        node = todo.pop(0)
        if node is None:
            continue
        if _is_sign(node):
            return True
        children = [child for child, _ in node.next_functions if child is not None and child not in seen]
        seen.update(children)
        todo += children
    return False


def _is_sign(node: Any) -> bool:
    name = type(node).__name__
    if name.startswith(PAIRWISE):
        return True
    if name.startswith(STATISTICS) and _is_over_samples(node):
        return True
    shape = _shape(node)
    if name.startswith("MmBackward"):
        return not any(_is_parameter(child) for child, _ in node.next_functions)
    if shape != ():
        return False
    if name.startswith(("MeanBackward", "DivBackward")) or getattr(node, "_saved_reduction", None) == MEAN:
        return True
    is_sum = name.startswith(("AddBackward", "SubBackward"))
    return is_sum and any(_is_penalty(child) for child, _ in node.next_functions)


def _is_over_samples(node: Any) -> bool:
    """Return whether an operation reduces or normalizes along dimension 0."""
    dims = getattr(node, "_saved_dim", None)
    return 0 in dims if isinstance(dims, tuple | list) else dims == 0


def _shape(node: Any) -> tuple[int, ...] | None:
    """Return the shape of what an operation computed; None if unknown."""
    metadata = getattr(node, "_input_metadata", ())
    return tuple(metadata[0].shape) if metadata else None


def _is_parameter(node: Any) -> bool:
    """Return whether a node is a leaf, or a leaf that is only transposed or cast."""
    for _ in range(MAX_CHAIN):
        if node is None or type(node).__name__ == ACCUMULATE:
            return True
        children = [child for child, _ in node.next_functions]
        if len(children) != 1 or not type(node).__name__.startswith(LAYOUT_OPERATIONS):
            return False
        node = children[0]
    return False


def _is_penalty(node: Any) -> bool:
    """Return whether a scalar depends on one leaf by a short chain of operations."""
    for _ in range(MAX_CHAIN):
        if node is None:
            return False
        if type(node).__name__ == ACCUMULATE:
            return True
        children = {child for child, _ in node.next_functions if child is not None}
        if len(children) != 1:
            return False
        node = children.pop()
    return False


def may_depend_on_cut(result: Any, num_samples: int) -> bool:
    """Return whether the loss of a micro-batch may not be a sum over independent samples."""
    terms = result.values() if isinstance(result, Mapping) else [result]
    for term in terms:
        if not isinstance(term, tuple | list) or len(term) != 2 or not isinstance(term[0], Tensor):
            return False  # refused when it is recorded
        loss_sum, items = term
        if may_combine_samples(loss_sum):
            return True
        if not isinstance(items, Tensor) and 2 * items == num_samples:
            return True  # one item for two samples: pairs, which a cut may separate
    return False
