"""What the first SIGINT or SIGTERM asks for, and since when; a second one interrupts at once."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """Whether a run was asked to stop.

    Args:
        grace_s: Seconds after the signal in which the update may be finished.

    Attributes:
        signal: The name of the first signal; None before it.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._since_s = 0.0
        self.signal: str | None = None

    def ask(self, number: int) -> None:
        """Hear of a signal.

        Raises:
            KeyboardInterrupt: It is not the first.
        """
        if self.signal is not None:
            raise KeyboardInterrupt
        self._since_s = time.monotonic()
        self.signal = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name

    @property
    def asked(self) -> bool:
        """Whether to stop after this update."""
        return self.signal is not None

    @property
    def overdue(self) -> bool:
        """Whether the time is over in which this update may be finished."""
        return self.signal is not None and time.monotonic() - self._since_s >= self._grace_s


@contextmanager
def stop_on_signals(grace_s: float, *, quiet: bool = False) -> Iterator[Stop]:
    """Collect the first SIGINT or SIGTERM; handlers that were there come back. ``quiet``: where another rank speaks."""
    stop = Stop(grace_s)

    def note(number: int, _frame: Any) -> None:
        stop.ask(number)
        # Not print(): the signal may have come in the middle of another one, which cannot be entered twice.
        if not quiet:
            os.write(2, b"\nstopping after this update and saving; once more to stop at once\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
