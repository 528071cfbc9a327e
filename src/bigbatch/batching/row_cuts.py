"""Micro-batches of one tensor: rows along any dimension, of strided, jagged and sparse tensors."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Cut: TypeAlias = Callable[[Sequence[int]], Any]


def row_cuts(leaves: Sequence[Any], dim: int) -> list[Cut]:
    """Return for each leaf the function that returns its part for the samples of a micro-batch.

    Args:
        leaves: None, 0-d tensors, which are returned unchanged, and tensors that `samples_of` accepts.
        dim: The dimension that is the sample.
    """
    offsets: dict[int, _Offsets] = {}  # by the offsets of the whole batch: tensors that share them still do when cut
    return [_row_cut(leaf, dim, offsets) for leaf in leaves]


def _row_cut(leaf: Any, dim: int, offsets: "dict[int, _Offsets]") -> Cut:
    if leaf is None or not leaf.ndim:
        return lambda _rows: leaf
    if leaf.is_nested:
        shared = offsets.setdefault(id(leaf.offsets()), _Offsets(leaf))
        return lambda rows: shared.take(leaf.values(), rows)
    if leaf.layout is torch.sparse_coo:
        return lambda rows: leaf.index_select(dim, torch.tensor(list(rows), device=leaf.device))
    is_contiguous = leaf.is_contiguous()

    def rows_of(rows: Sequence[int]) -> Tensor:
        index = slice(rows.start, rows.stop) if isinstance(rows, range) else list(rows)
        part: Tensor = leaf[(*(slice(None),) * dim, index)]
        return part.contiguous() if is_contiguous else part  # as the whole batch: the same views of it are possible

    return rows_of


class _Offsets:
    """Where each sample of jagged tensors starts and ends. Waits for the device of the tensor, once a batch."""

    def __init__(self, whole: Tensor) -> None:
        jagged: Any = whole
        starts = jagged.offsets().tolist()
        lengths = jagged.lengths()
        stops = starts[1:] if lengths is None else [a + n for a, n in zip(starts[:-1], lengths.tolist(), strict=True)]
        self._spans = list(zip(starts[:-1], stops, strict=True))
        self._of_whole: Tensor = jagged.offsets()
        self._rows: Sequence[int] | None = None
        self._of_rows: Tensor | None = None

    def take(self, values: Tensor, rows: Sequence[int]) -> Tensor:
        spans = [self._spans[row] for row in rows]
        if self._of_rows is None or rows is not self._rows:
            ends = [0]
            for start, stop in spans:
                ends.append(ends[-1] + stop - start)
            self._rows, self._of_rows = rows, self._of_whole.new_tensor(ends)
        parts = torch.cat([values[start:stop] for start, stop in spans])
        taken: Tensor = torch.nested.nested_tensor_from_jagged(parts, self._of_rows)
        return taken
