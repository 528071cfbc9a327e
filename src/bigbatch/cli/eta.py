"""Throughput and remaining time of a run; validation and sampling do not count as training time."""

import time
from collections.abc import Callable


class EtaEstimator:
    """Timer with separate totals for updates, validations and other work.

        seconds left = updates left × mean update + validations left × mean validation

    Args:
        total_steps: Updates of the run.
        validation_every: Updates between two validations, with one more after the last update; None for none.
        clock: Returns seconds.
    """

    def __init__(
        self, *, total_steps: int, validation_every: int | None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._total_steps = total_steps
        self._validation_every = validation_every
        self._clock = clock
        self._last_s = clock()
        self._steps = self._tokens = self._validations = 0
        self._updates_s = self._validations_s = 0.0

    def start(self) -> None:
        """Start the first lap; earlier time is not counted."""
        self._lap()

    def updated(self, tokens: int) -> None:
        """Count the time since the last call as one update of ``tokens`` tokens."""
        self._updates_s += self._lap()
        self._steps += 1
        self._tokens += tokens

    def validated(self) -> None:
        """Count the time since the last call as one validation."""
        self._validations_s += self._lap()
        self._validations += 1

    def paused(self) -> None:
        """Discard the time since the last call."""
        self._lap()

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second over all updates."""
        return self._tokens / self._updates_s if self._updates_s else 0.0

    @property
    def left_s(self) -> float:
        """Estimated seconds until the end of the run, at the mean pace so far."""
        update_s = self._updates_s / max(1, self._steps)
        validation_s = self._validations_s / max(1, self._validations)
        return update_s * (self._total_steps - self._steps) + validation_s * self._validations_left()

    def _validations_left(self) -> int:
        if self._validation_every is None:
            return 0
        return -(-self._total_steps // self._validation_every) - self._validations

    def _lap(self) -> float:
        now_s = self._clock()
        lap_s, self._last_s = now_s - self._last_s, now_s
        return lap_s
