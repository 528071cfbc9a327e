"""metrics.jsonl as columns of numbers: whole lines alone, by step, whatever a line holds."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NUMBERS = (
    "loss",
    "items",
    "grad_norm",
    "lr",
    "num_microbatches",
    "tokens",
    "tokens_per_s",
    "peak_bytes",
    "elapsed_s",
    "validation_loss",
    "retries",
    "noise_scale_items",
    "global_batch",
    "ranks",
    "slowest_rank",
    "slowest_share",
)
"""What of a line is drawn; one that a line lacks, or that is no finite number, is NaN."""

LARGEST = 1e300  # differences of what is larger would not be finite


@dataclass(frozen=True)
class Skip:
    """An update that changed nothing.

    Attributes:
        step: Which.
        reason: As the line says it.
    """

    step: int
    reason: str


@dataclass
class Columns:
    """The lines of a run, by step.

    Attributes:
        steps: Of each line, increasing.
        skipped: The updates that changed nothing.
        num_unreadable: Lines that are no record of an update; a last one without its end does not count.
        num_bytes: What was read, up to the end of the last whole line.
    """

    steps: array[int] = field(default_factory=lambda: array("q"))
    skipped: list[Skip] = field(default_factory=list)
    num_unreadable: int = 0
    num_bytes: int = 0
    _numbers: dict[str, array[float]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Sequence[float]:
        """Give a column as long as ``steps``; NaN where a line has no finite number."""
        return self._numbers[name] if name in self._numbers else array("d", [math.nan]) * len(self.steps)

    def has(self, name: str) -> bool:
        """Tell whether any line has a finite number there."""
        return name in self._numbers

    def last(self, name: str) -> float | None:
        """Give the last finite number of a column."""
        return next((value for value in reversed(self[name]) if math.isfinite(value)), None)


def read_columns(path: Path) -> Columns:
    """Read metrics.jsonl as far as it is written by now.

    Of lines with the same step the last counts. Numbers beyond a float are NaN.

    Raises:
        OSError: It cannot be read. One that is not there has no lines.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    end = data.rfind(b"\n") + 1
    found = Columns(num_bytes=end)
    rows: dict[int, dict[str, Any]] = {}
    for line in data[:end].splitlines():
        row = _row(line)
        if row is None:
            found.num_unreadable += bool(line.strip())
        else:
            rows[row["step"]] = row
    ordered = sorted(rows)
    found.steps = array("q", ordered)
    for name in NUMBERS:
        column = array("d", [_number(rows[step].get(name)) for step in ordered])
        if any(value == value for value in column):
            found._numbers[name] = column
    found.skipped = [Skip(step, str(rows[step]["skipped"])) for step in ordered if rows[step].get("skipped")]
    return found


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < 2**62:
        return None
    return row


def _number(value: object) -> float:
    if type(value) not in (int, float):
        return math.nan
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.nan
    return number if abs(number) <= LARGEST else math.nan
