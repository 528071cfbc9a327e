"""Detect in-place writes to the tensors of a batch: whatever is computed from it again would have other values."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor

_VERSION = attrgetter("_version")


class BatchWrites:
    """The tensors of a batch or micro-batch with their versions; views, such as micro-batches, share them.

    Writes of other libraries to the same memory, such as NumPy, have no version and are not seen.

    Args:
        batch: Tensors in nested mappings, lists, tuples and dataclasses; anything else is ignored.
    """

    def __init__(self, batch: Any) -> None:
        # Tensors made under inference_mode have no version, and cannot be written to outside of it.
        self._tensors = [tensor for tensor in _tensors_in(batch) if not tensor.is_inference()]
        self._versions = list(map(_VERSION, self._tensors))

    @property
    def found(self) -> bool:
        """Whether any of them was written to since."""
        return list(map(_VERSION, self._tensors)) != self._versions


def draw(microbatches: Iterable[Any]) -> list[Any]:
    """Draw the micro-batches of a window before the first one is used.

    Raises:
        ValueError: Drawing one has changed an earlier one.
    """
    drawn, writes = [], []
    for microbatch in microbatches:
        drawn.append(microbatch)
        writes.append(BatchWrites(microbatch))
    if any(each.found for each in writes):
        raise ValueError(
            f"the loader has written to tensors that it had yielded before, and the {len(drawn)} micro-batches of this "
            "window are drawn before the first one is used: they would all be the last one. Let it yield new tensors, "
            "for example by clone()."
        )
    return drawn


def _tensors_in(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
        return
    values: Any = ()
    if isinstance(batch, Mapping):
        values = batch.values()
    elif isinstance(batch, list | tuple):
        values = batch
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        values = (getattr(batch, field.name, None) for field in dataclasses.fields(batch))
    for value in values:
        yield from _tensors_in(value)
