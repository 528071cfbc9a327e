"""Batches that are not collated yet, in forms that pass through a DataLoader, accelerate and the Trainer's loop.

    loader → SampleBatch, SampleBatch, SampleBatch → EmptyBatch, EmptyBatch, WindowBatch with all samples

Each is an empty dict with attributes: the loop counts them as the batches that they stand for, and code that looks up a
key in a batch finds none.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

from bigbatch.integrations.transformers.pieces import Pieces


class SampleBatch(dict[str, Any]):
    """The samples of one batch of a loader, not collated.

    Args:
        samples: As the dataset returned them, without the columns that the Trainer removes.
    """

    def __init__(self, samples: Sequence[Any] = ()) -> None:
        super().__init__()
        self.samples = list(samples)

    def to(self, *_: Any, **__: Any) -> Self:
        """Return itself: micro-batches are moved when they are collated."""
        return self

    def pin_memory(self, *_: Any) -> Self:
        """Return itself."""
        return self


class EmptyBatch(SampleBatch):
    """Stands for a batch of a window whose samples are in the last one."""


class WindowBatch(SampleBatch):
    """All samples of a window.

    Args:
        samples: Of all batches, in their order; or the batches themselves, if the loader collated them.
        is_collated: Whether they are batches that the loader collated.

    Attributes:
        pieces: The micro-batches that were run of it.
    """

    def __init__(self, samples: Sequence[Any] = (), *, is_collated: bool = False) -> None:
        super().__init__(samples)
        self.is_collated = is_collated
        self.pieces = Pieces()


class SampleCollator:
    """A collator that leaves samples as they are.

    Args:
        collator: The one that it replaces, whose attributes it has.
    """

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self._collator = collator

    def __call__(self, samples: Sequence[Any]) -> SampleBatch:
        """Return the samples as one batch."""
        return SampleBatch(samples)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_collator":  # asked for while it is unpickled
            raise AttributeError(name)
        return getattr(self._collator, name)


def as_window(batches: Sequence[Any], held: Sequence[Any] = ()) -> list[SampleBatch]:
    """Return as many batches as there are, all empty but the last one, which has the samples of all.

    Args:
        batches: Of a loader, at least one.
        held: Samples before them, of a window that was not followed by an update.
    """
    if all(isinstance(batch, SampleBatch) for batch in batches):
        window = WindowBatch([*held, *(sample for batch in batches for sample in batch.samples)])
    else:
        window = WindowBatch([*held, *batches], is_collated=True)
    return [*(EmptyBatch() for _ in batches[1:]), window]


def take_whole(batches: Sequence[Any]) -> Any:
    """Return the only batch of a list: the collator of batches that are collated already."""
    (batch,) = batches
    return batch


def copy_samples(samples: Sequence[Any]) -> list[Any]:
    """Return shallow copies of samples that are dicts: some collators write to them, and may run twice."""
    return [dict(sample) if type(sample) is dict else sample for sample in samples]
