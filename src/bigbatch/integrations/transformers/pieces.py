"""What was counted for the micro-batches of a window, each sample once, even if memory ran out and it ran again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bigbatch.types import Items


@dataclass(eq=False)
class Piece:
    """Counts of one micro-batch.

    Attributes:
        rows: Indices of its samples in the window.
        items: What its loss is divided by.
        floating_point_ops: Of its forward and backward, as the Trainer counts them.
        input_tokens: As the Trainer counts them; with or without padding, as its arguments say.
        metrics: Values that the trainer's loss appended to its metrics, by name.
        train_tokens: What it added to the tokens that TRL counts.
    """

    rows: Sequence[int]
    items: Items
    floating_point_ops: float = 0.0
    input_tokens: int = 0
    metrics: dict[str, list[float]] = field(default_factory=dict)
    train_tokens: float = 0


class Pieces:
    """The micro-batches of one window; a later one replaces earlier ones whose samples it repeats."""

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
