"""Schedules of the global batch: piecewise constant, a linear ramp, or growth instead of learning-rate decay.

"0:64 2e6:128 8e6:256" | "ramp 64 256 8e6" | "seesaw 0.5" → read → sequences of the next window, by tokens consumed

No torch here: the command line parses and validates with this module.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

FORMS = '"0:64 2e6:128" (tokens:sequences), "ramp 64 256 8e6" (first, last, tokens) or "seesaw 0.5"'
DEFAULT_MAX_MULTIPLE = 64.0  # of the first batch, for seesaw


@dataclass(frozen=True)
class PiecewiseConstant:
    """A constant batch between boundaries.

    Attributes:
        boundaries: ``(tokens, sequences)``: the batch from that many tokens on; the first at 0, in ascending order.
    """

    boundaries: tuple[tuple[int, int], ...]

    @property
    def first(self) -> int:
        """Global batch at the start of the run."""
        return self.boundaries[0][1]

    def batch_at(self, tokens: int) -> int:
        """Return the sequences of the window that starts after ``tokens`` tokens."""
        return next(batch for start, batch in reversed(self.boundaries) if tokens >= start)

    def __str__(self) -> str:
        (_, first), *others = self.boundaries
        later = "".join(f", {batch:,} from {start:,} tokens on" for start, batch in others)
        return f"{first:,} sequences{later}"


@dataclass(frozen=True)
class Ramp:
    """A batch that changes linearly with the tokens consumed, then stays constant.

    Attributes:
        start: Sequences at the beginning.
        end: Sequences after ``tokens``.
        tokens: Length of the ramp.
    """

    start: int
    end: int
    tokens: int

    @property
    def first(self) -> int:
        """Global batch at the start of the run."""
        return self.start

    def batch_at(self, tokens: int) -> int:
        """Return the sequences of the window that starts after ``tokens`` tokens."""
        return self.start + math.floor((self.end - self.start) * min(1.0, tokens / self.tokens) + 0.5)

    def __str__(self) -> str:
        return f"{self.start:,} sequences, linearly to {self.end:,} over {self.tokens:,} tokens"


@dataclass(frozen=True)
class Seesaw:
    """Growth of the batch by 1/α, with the learning rate multiplied by √α, wherever the rate would be multiplied by α.

    Source: Meterez et al., "Seesaw: Accelerating Training by Balancing Learning Rate and Batch Size Scheduling", 2025:
    under Adam, while noise dominates the gradient, the loss follows the same curve in fewer updates.

    Attributes:
        alpha: Decay factor, above 0 and below 1.
        max_multiple: Largest multiple of the first batch.
    """

    alpha: float
    max_multiple: float = DEFAULT_MAX_MULTIPLE

    @property
    def first(self) -> None:
        """None: the run starts with --global-batch."""
        return None

    def stage(self, factor: float) -> int:
        """Return how many times the rate has decayed by α at ``factor`` of its peak, up to ``max_multiple``."""
        decays = math.floor(math.log(factor) / math.log(self.alpha) + 1e-9) if factor < 1 else 0
        return min(decays, math.floor(math.log(self.max_multiple) / -math.log(self.alpha) + 1e-9))

    def batch(self, first: int, factor: float) -> int:
        """Return the sequences of a window, from the first batch and the scheduled fraction of the peak rate."""
        return round(first * self.alpha ** -self.stage(factor))

    def factor(self, factor: float) -> float:
        """Return the fraction of the peak rate used instead; at the largest batch, the rate decays as scheduled."""
        stage = self.stage(factor)
        beyond = factor / self.alpha**stage if self.stage(factor * self.alpha) == stage else 1.0
        return math.sqrt(self.alpha) ** stage * beyond

    def __str__(self) -> str:
        return (
            f"multiplied by {1 / self.alpha:g} wherever the learning rate would be multiplied by {self.alpha:g}, up to "
            f"{self.max_multiple:g} times the first batch"
        )


Schedule = PiecewiseConstant | Ramp | Seesaw


def read(text: str) -> Schedule:
    """Parse the text of ``--global-batch-schedule``.

    Raises:
        ValueError: Not a schedule; the message continues a sentence that names the flag and its value.
    """
    words = text.replace(",", " ").split()
    if not words:
        raise ValueError(f"it must be {FORMS}")
    if words[0] == "ramp":
        return _ramp(words[1:])
    if words[0] == "seesaw":
        return _seesaw(words[1:])
    boundaries = []
    for word in words:
        tokens, colon, batch = word.partition(":")
        if not colon:
            raise ValueError(f"it must be {FORMS}, but {word!r} has no colon")
        boundaries.append((_count(tokens, minimum=0), _count(batch, minimum=1)))
    if boundaries[0][0] != 0:
        raise ValueError(f"it must start at 0 tokens, but starts at {boundaries[0][0]:,}")
    for (before, _), (after, _) in itertools.pairwise(boundaries):
        if after <= before:
            raise ValueError(f"its tokens must increase, but {after:,} follows {before:,}")
    return PiecewiseConstant(tuple(boundaries))


def _ramp(words: list[str]) -> Ramp:
    if len(words) != 3:
        raise ValueError('a ramp needs three numbers, as in "ramp 64 256 8e6": first batch, last batch, tokens')
    start, end, tokens = (_count(word, minimum=1) for word in words)
    return Ramp(start, end, tokens)


def _seesaw(words: list[str]) -> Seesaw:
    numbers = [_number(word) for word in words]
    if not 1 <= len(numbers) <= 2 or not 0 < numbers[0] < 1 or (len(numbers) == 2 and numbers[1] < 1):
        raise ValueError(
            "seesaw needs the decay factor of the rate, between 0 and 1, and optionally the largest multiple of the "
            'batch, 1 or more, as in "seesaw 0.5" or "seesaw 0.5 8"'
        )
    return Seesaw(*numbers)


def _count(word: str, *, minimum: int) -> int:
    number = _number(word)
    if number != int(number) or number < minimum:
        raise ValueError(f"{word!r} must be a whole number of {minimum} or more, such as 2000000 or 2e6")
    return int(number)


def _number(word: str) -> float:
    try:
        number = float(word.replace("_", ""))
    except ValueError:
        raise ValueError(f"{word!r} is not a number; it must be {FORMS}") from None
    if not math.isfinite(number) or abs(number) > 2**53:
        raise ValueError(f"{word!r} is out of range")
    return number
