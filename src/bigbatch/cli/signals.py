"""Handling of SIGINT and SIGTERM: the first one requests a stop, a second one interrupts immediately."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class StopRequest:
    """State of a stop request by signal.

    Args:
        grace_s: Seconds after the signal in which the current update may finish.
        duplicate_s: Seconds after the signal in which further signals count as the same one.

    Attributes:
        signal: Name of the first signal; None before it.
    """

    def __init__(self, grace_s: float, *, duplicate_s: float = 0.0) -> None:
        self._grace_s = grace_s
        self._duplicate_s = duplicate_s
        self._since_s = 0.0
        self.signal: str | None = None

    def receive(self, number: int) -> bool:
        """Record a signal; return whether it is the first one.

        Raises:
            KeyboardInterrupt: It is a second one, and not a duplicate of the first.
        """
        if self.signal is not None:
            if time.monotonic() - self._since_s < self._duplicate_s:
                return False
            raise KeyboardInterrupt
        self._since_s = time.monotonic()
        self.signal = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        return True

    @property
    def requested(self) -> bool:
        """Whether the run is to stop after the current update."""
        return self.signal is not None

    @property
    def grace_expired(self) -> bool:
        """Whether the time in which the current update may finish has passed."""
        return self.signal is not None and time.monotonic() - self._since_s >= self._grace_s


@contextmanager
def stop_on_signals(grace_s: float, *, duplicate_s: float = 0.0, quiet: bool = False) -> Iterator[StopRequest]:
    """Install handlers for SIGINT and SIGTERM that record a stop request; restore the previous handlers on exit.

    Args:
        grace_s: As for `StopRequest`.
        duplicate_s: As for `StopRequest`.
        quiet: Whether to print nothing, as on all ranks but the first.
    """
    stop = StopRequest(grace_s, duplicate_s=duplicate_s)

    def handler(number: int, _frame: Any) -> None:
        # Not print(): the signal may have interrupted another print(), which is not reentrant.
        if stop.receive(number) and not quiet:
            with suppress(OSError):  # a closed or full stderr must not end the run
                os.write(2, b"\nstopping after this update, then saving; signal again to stop immediately\n")

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)
