"""Features of micro-batches: checked, joined in the order of the batch, and taken apart again."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bigbatch.batching.batch_types import Structure, flatten
from bigbatch.errors import InputError
from bigbatch.gradients.loss_checks import describe


@dataclass(frozen=True)
class Features:
    """The features of some samples.

    Attributes:
        leaves: Tensors ``[samples, ...]``, and constants.
        structure: Of the value that ``encode`` returned.
        num_samples: Rows of each tensor.
    """

    leaves: list[Any]
    structure: Structure
    num_samples: int

    def value(self) -> Any:
        """Return them as ``encode`` did."""
        return self.structure.unflatten(self.leaves)

    def first(self, num_samples: int) -> "Features":
        """Return those of the first samples."""
        leaves = [leaf[:num_samples] if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return Features(leaves, self.structure, num_samples)

    def copied(self) -> "Features":
        """Return copies with a graph, which the loss may change in place."""
        leaves = [leaf.clone() if is_differentiable(leaf) else leaf for leaf in self.leaves]
        return Features(leaves, self.structure, self.num_samples)

    def detached(self) -> "Features":
        """Return copies without a graph, which hold no larger tensor that features are views of."""
        leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return Features(leaves, self.structure, self.num_samples)


def flatten_features(value: Any, num_samples: int | None = None) -> Features:
    """Return what ``encode`` returned as leaves.

    Args:
        value: The features of one micro-batch.
        num_samples: Of the micro-batch; None if unknown.

    Raises:
        InputError: The features are not one row for each sample.
        TypeError: There is no tensor, or one that is not strided.
    """
    leaves, structure = flatten(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        raise TypeError(
            f"encode returned {describe(value)} without a tensor: it must return the features of the micro-batch, a "
            "tensor [samples, ...] or a pytree of such tensors."
        )
    for tensor in tensors:
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise TypeError(f"a feature has the layout {tensor.layout}: encode must return strided tensors.")
        rows = tensor.shape[0] if tensor.ndim else None
        num_samples = rows if num_samples is None else num_samples
        if rows is None or rows != num_samples:
            count = "its samples" if num_samples is None else f"{num_samples} samples"
            raise InputError(
                f"encode returned {describe(tensor)} for a micro-batch of {count}: each feature needs one row for each "
                "sample. Reshape several rows of a sample to [samples, rows, ...]."
            )
    assert num_samples is not None, "there is a tensor"
    return Features(leaves, structure, num_samples)


def is_differentiable(leaf: Any) -> bool:
    """Return whether a leaf can have a gradient."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def join(parts: Sequence[Features], rows: Sequence[int]) -> Features:
    """Join the features of micro-batches in the order of their samples.

    Args:
        parts: Of each micro-batch, at least one.
        rows: The sample of each row, over all parts.

    Raises:
        InputError: The micro-batches have features of different shapes, or constants that differ.
    """
    first = parts[0]
    if any(len(part.leaves) != len(first.leaves) for part in parts):
        raise InputError(
            f"encode returned {len(first.leaves)} values for one micro-batch, and another number for another: it must "
            "return as many for each. Values that differ by sample must be tensors [samples, ...]."
        )
    order = None
    if any(left > right for left, right in pairwise(rows)):
        order = torch.tensor(sorted(range(len(rows)), key=rows.__getitem__))
    leaves = [_joined(list(column), order) for column in zip(*(part.leaves for part in parts), strict=True)]
    return Features(leaves, first.structure, len(rows))


def _joined(column: list[Any], order: Tensor | None) -> Any:
    first = column[0]
    if not isinstance(first, Tensor):
        if any(type(leaf) is not type(first) or leaf != first for leaf in column):
            raise InputError(
                f"encode returned {first!r:.40} among the features of one micro-batch, and something else for another: "
                "values that differ by sample must be tensors [samples, ...]."
            )
        return first
    forms = {_form(leaf): leaf for leaf in column}
    if len(forms) > 1:
        found = " and ".join(f"{describe(leaf)} in {getattr(leaf, 'dtype', 'Python')}" for leaf in forms.values())
        raise InputError(
            f"encode returned features of different shapes or dtypes for two micro-batches ({found}): the loss needs "
            "all of them as one tensor. Pool or pad them to one size for every sample."
        )
    joined = torch.cat(column) if len(column) > 1 else first
    return joined if order is None else joined[order.to(joined.device)]


def _form(leaf: Any) -> Any:
    return (tuple(leaf.shape[1:]), leaf.dtype) if isinstance(leaf, Tensor) else None


def select(tensor: Tensor, rows: Sequence[int], positions: dict[int, int] | None) -> Tensor:
    """Return the rows of some samples, as a view if they are neighbours.

    Args:
        tensor: ``[samples, ...]`` in the order of the batch.
        rows: Samples.
        positions: The row of each sample; None if sample i is row i.
    """
    if positions is None and isinstance(rows, range) and rows.step == 1:
        return tensor[rows.start : rows.stop]
    index = list(rows) if positions is None else [positions[row] for row in rows]
    return tensor[torch.tensor(index, device=tensor.device)]
