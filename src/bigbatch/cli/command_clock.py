"""When the command began, to say how long its start took."""

import time

_started_s = time.monotonic()


def start() -> None:
    """Begin to count: a command begins."""
    global _started_s
    _started_s = time.monotonic()


def elapsed_s() -> float:
    """Return the seconds since the command began."""
    return time.monotonic() - _started_s
