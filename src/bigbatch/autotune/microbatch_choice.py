"""The result of tuning: the chosen micro-batch size and the measurements that led to it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bigbatch.autotune.time_model import TimeModel
from bigbatch.batching.plan import TokenBudget
from bigbatch.memory.limit import describe_bytes

_OLD_NAMES = {"tried": "trials", "unpredicted": "prediction_failure"}  # of fields, in runs of bigbatch 0.1.0


@dataclass(frozen=True)
class Trial:
    """One micro-batch size that was timed.

    Attributes:
        size: Largest number of tokens, padding included, or of samples, of a micro-batch.
        per_s: Throughput at that size, as that of `MicrobatchChoice`.
    """

    size: int
    per_s: float


@dataclass(frozen=True)
class MicrobatchChoice:
    """The micro-batch size that ``microbatch="auto"`` chose, with the reasons; ``str(choice)`` is one line.

    Attributes:
        size: Largest number of tokens, padding included, or of samples, of a micro-batch. A longer sample runs alone.
        longest: Tokens of the longest sample; 1 if sizes are in samples.
        unit: ``"tokens"`` or ``"samples"``.
        peak_bytes: Expected peak memory of a window and its update.
        limit_bytes: The memory limit.
        per_s: Expected throughput: tokens without padding (or samples) per second of forward and backward, and with
            ``offload="gradients"`` of waiting for gradient sums, without updates.
        largest: The largest size that fits.
        trials: The sizes that were timed, ascending.
        timing: The time of a micro-batch as a function of its size.
        prediction_failure: Why the peak was measured instead of predicted; None if it was predicted.
        limited: Whether memory, not speed, limited the size.
    """

    size: int
    longest: int
    unit: str
    peak_bytes: int
    limit_bytes: int
    per_s: float
    largest: int
    trials: tuple[Trial, ...]
    timing: TimeModel = field(repr=False)
    prediction_failure: str | None = None
    limited: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MicrobatchChoice":
        """Build a choice from the output of `dataclasses.asdict`, also after a round trip through JSON."""
        values = {_OLD_NAMES.get(name, name): value for name, value in values.items()}
        trials = tuple(Trial(**each) for each in values["trials"])
        points = tuple((int(size), float(seconds)) for size, seconds in values["timing"]["points"])
        return cls(**{**values, "trials": trials, "timing": TimeModel(points)})

    @property
    def microbatch(self) -> int | TokenBudget:
        """The choice as ``microbatch=`` of `bigbatch.Engine`; a token budget admits the longest sample."""
        return TokenBudget(max(self.size, self.longest)) if self.unit == "tokens" else self.size

    def __str__(self) -> str:
        reasons = f"about {self.per_s:,.0f} {self.unit}/s, peak {describe_bytes(self.peak_bytes)} of "
        reasons += describe_bytes(self.limit_bytes)
        if self.trials and self.trials[0].size < self.size:
            reasons += f"; {self.trials[0].size:,} reached {self.trials[0].per_s:,.0f}/s"
        if self.largest > self.size:
            reasons += f"; sizes up to {self.largest:,} fit but are less than 2 % faster"
        alone = ", longer samples alone" if self.longest > self.size else ""
        return f"at most {self.size:,} {self.unit} per micro-batch{alone}: {reasons}"
