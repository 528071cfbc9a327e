"""Notice that updates are much faster than the micro-batch was timed: it was chosen while the machine was busy.

metrics row of each update → median of the last ones against the timed speed → whether to choose again
"""

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from bigbatch.autotune.choice import MicrobatchChoice

FASTER = 1.5  # times the timed speed. An update has more to do than what was timed, so it is slower on an equal machine
UPDATES = 8  # whose median counts
MOST_CHOICES = 3  # in one process


class SpeedWatch:
    """Compares the speed of updates with that of a choice, and says when to choose again.

    A machine that is slower than at the choice is left alone: it is busy now, and another choice would be as wrong.
    """

    def __init__(self) -> None:
        self._tokens_per_s: deque[float] = deque(maxlen=UPDATES)
        self._num_choices = 0

    def times_faster(self, row: Mapping[str, Any], choice: MicrobatchChoice) -> float | None:
        """Add one update; return how many times faster than timed the last ones were, if that calls for a new choice.

        Args:
            row: Of metrics.jsonl, with ``tokens_per_s``, which is None without a clock.
            choice: In use. One in samples has no speed in tokens.
        """
        if choice.unit != "tokens" or row["tokens_per_s"] is None or row["skipped"] or "retries" in row:
            return None
        self._tokens_per_s.append(row["tokens_per_s"])
        if len(self._tokens_per_s) < UPDATES or self._num_choices == MOST_CHOICES:
            return None
        factor = statistics.median(self._tokens_per_s) / choice.per_s
        if factor < FASTER:
            return None
        self._tokens_per_s.clear()
        self._num_choices += 1
        return factor
