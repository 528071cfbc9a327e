"""Batches that are not collated yet, in forms that pass through a DataLoader, accelerate and the Trainer's loop.

    loader → SampleBatch, SampleBatch, SampleBatch → EmptyBatch, EmptyBatch, WindowBatch with all samples

Each is an empty dict with attributes: the loop counts them as the batches that they stand for, and code that looks up a
key in a batch raises.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from bigbatch.errors import InputError
from bigbatch.types import Items


class Piece:
    """Counts of one micro-batch. No dataclass, whose fields the engine would search for tensors to move.

    Attributes:
        rows: Indices of its samples in the window.
        items: What its loss is divided by.
        floating_point_ops: Of its forward and backward, as the Trainer counts them.
        input_tokens: As the Trainer counts them; with or without padding, as its arguments say.
        metrics: Values that the trainer's loss appended to its metrics, by name.
        train_tokens: What it added to the tokens that TRL counts.
    """

    def __init__(self, rows: Sequence[int], items: Items) -> None:
        self.rows, self.items = rows, items
        self.floating_point_ops: float = 0.0
        self.input_tokens = 0
        self.metrics: dict[str, list[float]] = {}
        self.train_tokens: float = 0


class Pieces:
    """Counts of the micro-batches of one window; a later one replaces those whose samples it repeats."""

    def __init__(self) -> None:
        self._owners: dict[int, Piece] = {}

    def add(self, piece: Piece) -> None:
        """Add a micro-batch that will be run."""
        for row in piece.rows:
            self._owners[row] = piece

    def __iter__(self) -> Iterator[Piece]:
        return iter({id(piece): piece for piece in self._owners.values()}.values())

    @property
    def floating_point_ops(self) -> float:
        """Of the window, on this rank."""
        return sum(piece.floating_point_ops for piece in self)

    @property
    def input_tokens(self) -> int:
        """Of the window, on this rank."""
        return sum(piece.input_tokens for piece in self)


class SampleBatch(dict[str, Any]):
    """The samples of one batch of a loader, not collated.

    Args:
        samples: As the dataset returned them, without the columns that the Trainer removes.
    """

    def __init__(self, samples: Sequence[Any] = ()) -> None:
        super().__init__()
        self.samples = list(samples)

    def __missing__(self, key: Any) -> Any:
        raise self._not_collated(key)

    def __contains__(self, key: Any) -> bool:
        raise self._not_collated(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """Raise: nothing can be read before micro-batches are collated."""
        raise self._not_collated(key)

    def pop(self, key: Any, *_: Any) -> Any:
        """Raise, as for reading."""
        raise self._not_collated(key)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """Raise, as for reading."""
        raise self._not_collated(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise self._not_collated(key, "written to")

    def update(self, *others: Any, **values: Any) -> None:
        """Raise unless there is nothing to add: a value would be lost."""
        for key in dict(*others, **values):
            raise self._not_collated(key, "written to")

    def _not_collated(self, key: Any, verb: str = "read from") -> InputError:
        return InputError(
            f"{key!r} was {verb} a batch of a trainer that exact() was called on, whose samples are collated in "
            "micro-batches later: read or change inputs in compute_loss or in the data collator."
        )

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
        collated: Micro-batches that were collated ahead, by their rows.
    """

    def __init__(self, samples: Sequence[Any] = (), *, is_collated: bool = False) -> None:
        super().__init__(samples)
        self.is_collated = is_collated
        self.pieces = Pieces()
        self.collated: dict[tuple[int, ...], Any] = {}


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
