"""What the loss of one trainer is averaged over: as passed, or found on its first window."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from bigbatch.errors import InputError
from bigbatch.integrations.transformers.samples import WindowBatch
from bigbatch.integrations.transformers.unit_counts import Candidate
from bigbatch.integrations.transformers.units import UnitFinder
from bigbatch.types import Items

Count = Callable[[Mapping[str, Any]], Items]


class WindowUnit:
    """Counts the items of micro-batches.

    Args:
        trainer: Whose loss it is.
        items: As for `exact`.
        collate: Makes a micro-batch of samples, as the trainer does.
        compute_loss: ``compute_loss(model, inputs, num_items_in_batch) → mean``, of the trainer.
        audits_items: Whether ``items`` that were passed are checked against the loss.

    Attributes:
        count: Returns the items of a collated micro-batch.
        takes_num_items: Whether ``compute_loss`` returns the sum if it is called with one item.
    """

    def __init__(
        self,
        trainer: Any,
        items: Literal["auto"] | Callable[[Mapping[str, Any]], int | float],
        collate: Callable[[Sequence[Any]], Any],
        compute_loss: Callable[..., Tensor],
        *,
        audits_items: bool = True,
    ) -> None:
        self._trainer = trainer
        self._collate = collate
        self._compute_loss = compute_loss
        self._finders: dict[bool, UnitFinder] = {}
        self.is_given = items != "auto"
        self._audits_items = audits_items
        self.takes_num_items = False
        self.name = "items= that was passed" if callable(items) else ""
        self.count: Count = items if callable(items) else _not_found

    @property
    def needs_counts(self) -> bool:
        """Whether the next window of samples is counted in several units, which fitted so far."""
        finder = self._finders.get(False)
        return finder is not None and finder.needs_counts

    def prepare(self, window: WindowBatch, microbatches: Sequence[Any] | None = None) -> None:
        """Find the unit on a window, if it is not certain yet. Collective.

        Args:
            window: Its samples, or its batches.
            microbatches: As for `UnitFinder.unit`.

        Raises:
            InputError: It is not certain, on any rank.
        """
        if not self.is_given:
            self._find(window, microbatches)

    def audit_items(self, window: WindowBatch) -> None:
        """Check ``items`` that were passed against the loss of a window that has run. Collective.

        Raises:
            InputError: They are not what the loss is averaged over, on any rank.
        """
        if self.is_given and self._audits_items and not window.is_collated:
            self._finder(self._collate, key=False).unit(window.samples)

    def _find(self, window: WindowBatch, microbatches: Sequence[Any] | None) -> None:
        collate: Callable[[Any], Any] = self._collate
        samples: Sequence[Any] = window.samples
        if window.is_collated:
            collate, samples = _stack_rows, _Rows(window.samples)
        unit = self._finder(collate, key=window.is_collated).unit(samples, microbatches)
        self.name, self.count, self.takes_num_items = unit.name, unit.count, unit.takes_num_items
        claims_to_be_scaled = getattr(self._trainer, "loss_is_scaled_for_ga", None)
        if claims_to_be_scaled and not unit.takes_num_items and unit.name != "undetermined":
            raise InputError(
                f"loss_is_scaled_for_ga is True, and the loss is a mean over {unit.name} whatever num_items_in_batch "
                "is, so it seems to be divided by the number of accumulation steps, which would make updates too "
                "small: return the mean undivided, and set loss_is_scaled_for_ga to False."
            )

    def _finder(self, collate: Callable[[Any], Any], *, key: bool) -> UnitFinder:
        if key not in self._finders:
            given = Candidate(self.name, self.count) if self.is_given else None  # type: ignore[arg-type]
            self._finders[key] = UnitFinder(self._trainer, collate, self._compute_loss, given)
        return self._finders[key]


def _not_found(inputs: Mapping[str, Any]) -> Items:
    raise AssertionError("the unit is found before the first micro-batch")


class _Rows(Sequence[dict[str, Any]]):
    """Rows of the batches of a window: those of the first batch that has several, or of a window of one row.

    They are cut when they are used, so that `UnitFinder` raises an error of one rank on all.

    Args:
        batches: Collated by the loader.
    """

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches
        self._rows: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self._cut())

    def __getitem__(self, index: Any) -> Any:
        return self._cut()[index]

    def _cut(self) -> list[dict[str, Any]]:
        if self._rows is None:
            self._rows = next((rows for rows in map(_rows_of, self._batches) if rows is None or len(rows) > 1), None)
            if self._rows is None and len(self._batches) == 1:
                self._rows = _rows_of(self._batches[0])
            if self._rows is None:
                raise _uncuttable()
        return self._rows


def _rows_of(batch: Any) -> list[dict[str, Any]] | None:
    """Return the rows of a collated batch; None if its values are not tensors with a row for each sample."""
    values = list(batch.values()) if isinstance(batch, Mapping) else []
    if not values or not all(isinstance(value, Tensor) and value.ndim for value in values):
        return None
    sizes = {len(value) for value in values}
    if len(sizes) > 1:
        return None
    return [{name: value[row] for name, value in batch.items()} for row in range(sizes.pop())]


def _stack_rows(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    if any(row[name].shape != value.shape for row in rows for name, value in rows[0].items()):
        raise _uncuttable()  # rows of several ranks
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _uncuttable() -> InputError:
    return InputError(
        "the train dataloader yields batches that are collated already, and they cannot be cut into rows to find out "
        "what the loss is averaged over: pass items=, a function from a batch to the number that the loss is averaged "
        "over."
    )
