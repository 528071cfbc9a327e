"""The settings of `exact`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bigbatch.batching.plan import TokenBudget
from bigbatch.engine.checks import check_layout, check_microbatch
from bigbatch.errors import InputError
from bigbatch.types import Layout


@dataclass(frozen=True)
class Settings:
    """Arguments of `exact`, checked.

    Raises:
        InputError: One is out of range, or two do not go together.
    """

    microbatch: int | TokenBudget | Literal["auto"] | None = None
    memory: str | int | None = None
    lengths: Callable[[list[Any]], Sequence[int]] | None = None
    layout: Layout = "padded"
    items: Literal["auto"] | Callable[[Mapping[str, Any]], int | float] = "auto"
    nonfinite: Literal["skip", "raise"] = "skip"

    def __post_init__(self) -> None:
        if self.items != "auto" and not callable(self.items):
            raise InputError(
                f'items is {self.items!r}: it must be "auto", or a function from a collated micro-batch to the number '
                "that the trainer's loss is averaged over."
            )
        if self.nonfinite not in ("skip", "raise"):
            raise InputError(f'nonfinite is {self.nonfinite!r}: it must be "skip" or "raise".')
        try:
            check_layout(self.layout, self.lengths, "the collator of the trainer")
            if self.microbatch is not None:
                check_microbatch(self.microbatch, self.memory, self.lengths)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error

    @property
    def needs_samples(self) -> bool:
        """Whether micro-batches are to be others than the batches of the loader."""
        return self.microbatch is not None or self.memory is not None

    def microbatch_for(self, train_batch_size: int) -> int | TokenBudget | Literal["auto"]:
        """Return the micro-batch for a trainer with this batch size per device."""
        if self.microbatch is not None:
            return self.microbatch
        return train_batch_size if self.memory is None else "auto"
