"""Loss sums and items that do not depend on the order of the micro-batches or on the number of ranks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from bigbatch.gradients.loss_totals import LossTotals
from bigbatch.types import Items

Shares: TypeAlias = Mapping[str, Sequence[Sequence[float]]]
"""Of each term, the ``(items, loss_sum)`` of each micro-batch."""


class ExactTotals(LossTotals):
    """Totals whose values are those of the exact sum over all micro-batches, rounded once."""

    def shares(self) -> Shares:
        """Return items and loss of each micro-batch of this rank; waits for the device."""
        return {
            name: _pairs(self._items.get(name, []), self._sums.get(name, [])) for name in self.totals or self._items
        }

    def set_shares(self, ranks: Iterable[Shares]) -> None:
        """Set the global totals from the micro-batches of all ranks, in any order."""
        by_name: dict[str, list[Sequence[float]]] = {}
        for shares in ranks:
            for name, pairs in shares.items():
                by_name.setdefault(name, []).extend(pairs)
        for name in by_name:
            self._items.setdefault(name, [])  # of a term that this rank has not seen
        totals = []
        for name in sorted(self.totals or by_name):
            pairs = by_name.get(name, [])
            totals.append((exact_sum(items for items, _ in pairs), exact_sum(loss for _, loss in pairs)))
        self.set_global_totals(totals)


def exact_sum(values: Iterable[float]) -> float:
    """Return the sum of numbers, rounded once: the same for every order; NaN where there is none."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # out of range, or the difference of two infinities
        return math.nan


def _pairs(items: Sequence[Items], losses: Sequence[float | Tensor]) -> list[list[float]]:
    pairs = zip(_read_all(items), _read_all(losses), strict=True)
    return [[count, 0.0 if not count and math.isnan(loss) else loss] for count, loss in pairs]


def _read_all(values: Sequence[float | Tensor]) -> list[float]:
    """Return numbers and 0-d tensors as numbers, with one wait for the device."""
    tensors = [value.detach().reshape(()).to(torch.float64) for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else ())
    return [next(read) if isinstance(value, Tensor) else float(value) for value in values]
