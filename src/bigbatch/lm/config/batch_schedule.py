"""A global batch that changes within a run: by tokens consumed, in a ramp, or as the learning rate would fall.

"0:64 2e6:128 8e6:256" | "ramp 64 256 8e6" | "seesaw 0.5" → read → sequences of the next window, by what was consumed

No torch here: the command line reads and complains with it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

FORMS = '"0:64 2e6:128" (from so many tokens on: sequences), "ramp 64 256 8e6" (from, to, tokens) or "seesaw 0.5"'
LARGEST_MULTIPLE = 64.0  # of the first batch that seesaw goes to, where nobody says


@dataclass(frozen=True)
class Steps:
    """One batch after the other.

    Attributes:
        places: ``(tokens, sequences)``, the first at 0, in ascending order.
    """

    places: tuple[tuple[int, int], ...]

    @property
    def first(self) -> int:
        """The batch that the run begins with."""
        return self.places[0][1]

    def batch_at(self, tokens: int) -> int:
        """Give the sequences of the window that begins after so many tokens."""
        return next(batch for place, batch in reversed(self.places) if tokens >= place)

    def __str__(self) -> str:
        (_, first), *others = self.places
        later = "".join(f", {batch:,} from {place:,} tokens on" for place, batch in others)
        return f"{first:,} sequences{later}"


@dataclass(frozen=True)
class Ramp:
    """From one batch to another, in a straight line over the tokens.

    Attributes:
        start: Sequences at the beginning.
        end: Sequences after ``tokens``.
        tokens: Over which it changes.
    """

    start: int
    end: int
    tokens: int

    @property
    def first(self) -> int:
        """The batch that the run begins with."""
        return self.start

    def batch_at(self, tokens: int) -> int:
        """Give the sequences of the window that begins after so many tokens."""
        return self.start + math.floor((self.end - self.start) * min(1.0, tokens / self.tokens) + 0.5)

    def __str__(self) -> str:
        return f"{self.start:,} sequences, in a straight line to {self.end:,} over {self.tokens:,} tokens"


@dataclass(frozen=True)
class Seesaw:
    """Where the learning rate would fall by a factor α, it falls by √α, and the batch grows by 1/α.

    Source: Meterez et al., "Seesaw: Accelerating Training by Balancing Learning Rate and Batch Size Scheduling", 2025:
    under Adam, with noise as the larger part of the gradient, both take the loss along the same way, in fewer updates.

    Attributes:
        alpha: Above 0 and below 1.
        most: Largest multiple of the first batch.
    """

    alpha: float
    most: float = LARGEST_MULTIPLE

    @property
    def first(self) -> None:
        """The batch that the run begins with: that of --global-batch."""
        return None

    def stage(self, factor: float) -> int:
        """Count how often the rate has fallen by α, from its share of the peak."""
        fallen = math.floor(math.log(factor) / math.log(self.alpha) + 1e-9) if factor < 1 else 0
        return min(fallen, math.floor(math.log(self.most) / -math.log(self.alpha) + 1e-9))

    def batch(self, first: int, factor: float) -> int:
        """Give the sequences of a window, from those of the first and the share of the peak rate that would be."""
        return round(first * self.alpha ** -self.stage(factor))

    def factor(self, factor: float) -> float:
        """Give the share of the peak rate that is instead; beyond the largest batch, it falls as it would."""
        stage = self.stage(factor)
        beyond = factor / self.alpha**stage if self.stage(factor * self.alpha) == stage else 1.0
        return math.sqrt(self.alpha) ** stage * beyond

    def __str__(self) -> str:
        return (
            f"growing {1 / self.alpha:g} times where the learning rate would fall to {self.alpha:g} of itself, up to "
            f"{self.most:g} times"
        )


Schedule = Steps | Ramp | Seesaw


def read(text: str) -> Schedule:
    """Read what a flag says.

    Raises:
        ValueError: It is none; the message is what goes after the name of the flag and its value.
    """
    words = text.replace(",", " ").split()
    if not words:
        raise ValueError(f"it must be {FORMS}")
    if words[0] == "ramp":
        return _ramp(words[1:])
    if words[0] == "seesaw":
        return _seesaw(words[1:])
    places = []
    for word in words:
        tokens, colon, batch = word.partition(":")
        if not colon:
            raise ValueError(f"it must be {FORMS}, and {word!r} has no colon")
        places.append((_count(tokens, least=0), _count(batch, least=1)))
    if places[0][0] != 0:
        raise ValueError(f"it must begin at 0 tokens, and begins at {places[0][0]:,}")
    for (before, _), (after, _) in itertools.pairwise(places):
        if after <= before:
            raise ValueError(f"its tokens must ascend, and {after:,} comes after {before:,}")
    return Steps(tuple(places))


def _ramp(words: list[str]) -> Ramp:
    if len(words) != 3:
        raise ValueError('a ramp has three numbers, as in "ramp 64 256 8e6": from, to, and the tokens in between')
    start, end, tokens = (_count(word, least=1) for word in words)
    return Ramp(start, end, tokens)


def _seesaw(words: list[str]) -> Seesaw:
    numbers = [_number(word) for word in words]
    if not 1 <= len(numbers) <= 2 or not 0 < numbers[0] < 1 or (len(numbers) == 2 and numbers[1] < 1):
        raise ValueError(
            "seesaw has a factor below 1, by which the rate would fall, and at most the largest multiple of the batch, "
            'as in "seesaw 0.5" or "seesaw 0.5 8"'
        )
    return Seesaw(*numbers)


def _count(word: str, *, least: int) -> int:
    number = _number(word)
    if number != int(number) or number < least:
        raise ValueError(f"{word!r} must be a whole number of {least} or more, as 2000000 or 2e6")
    return int(number)


def _number(word: str) -> float:
    try:
        number = float(word.replace("_", ""))
    except ValueError:
        raise ValueError(f"{word!r} is no number; it must be {FORMS}") from None
    if not math.isfinite(number) or abs(number) > 2**53:
        raise ValueError(f"{word!r} is out of range")
    return number
