"""What the first SIGINT or SIGTERM asks for, and since when; a second one interrupts at once."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StopRequest:
    """Whether a run was asked to stop.

    Args:
        grace_s: Seconds after the signal in which the update may be finished.
        echo_s: Seconds after the signal in which others count as the same.

    Attributes:
        signal: The name of the first signal; None before it.
    """

    def __init__(self, grace_s: float, *, echo_s: float = 0.0) -> None:
        self._grace_s = grace_s
        self._echo_s = echo_s
        self._since_s = 0.0
        self.signal: str | None = None

    def ask(self, number: int) -> bool:
        """Hear of a signal; tell whether it is the first.

        Raises:
            KeyboardInterrupt: It is another one.
        """
        if self.signal is not None:
            if time.monotonic() - self._since_s < self._echo_s:
                return False
            raise KeyboardInterrupt
        self._since_s = time.monotonic()
        self.signal = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        return True

    @property
    def requested(self) -> bool:
        """Whether to stop after this update."""
        return self.signal is not None

    @property
    def grace_expired(self) -> bool:
        """Whether the time is over in which this update may be finished."""
        return self.signal is not None and time.monotonic() - self._since_s >= self._grace_s


@contextmanager
def stop_on_signals(grace_s: float, *, echo_s: float = 0.0, quiet: bool = False) -> Iterator[StopRequest]:
    """Collect the first SIGINT or SIGTERM; handlers that were there come back.

    Args:
        grace_s: As for `StopRequest`.
        echo_s: As for `StopRequest`.
        quiet: Whether another rank speaks.
    """
    stop = StopRequest(grace_s, echo_s=echo_s)

    def note(number: int, _frame: Any) -> None:
        # Not print(): the signal may have come in the middle of another one, which cannot be entered twice.
        if stop.ask(number) and not quiet:
            os.write(2, b"\nstopping after this update and saving; once more to stop at once\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
