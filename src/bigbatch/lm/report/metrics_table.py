"""metrics.jsonl as columns of numbers, by step. Accepts any content and ignores an incomplete last line."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigbatch.lm.files import LARGEST_LOG, read_regular

NUMBERS = (
    "loss",
    "router_aux_loss",
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
"""Keys of a line that are drawn; NaN if the line has no finite number there."""

LARGEST = 1e300  # differences of larger values would not be finite


@dataclass(frozen=True)
class Skip:
    """An update that changed nothing.

    Attributes:
        step: Number of the update.
        reason: The text in its line.
    """

    step: int
    reason: str


@dataclass
class Columns:
    """The lines of a run, by step.

    Attributes:
        steps: Step of each line, increasing.
        skipped: The updates that changed nothing.
        num_unreadable: Lines that are no record of an update, an incomplete last one excluded.
        num_bytes: Bytes up to the end of the last complete line.
    """

    steps: array[int] = field(default_factory=lambda: array("q"))
    skipped: list[Skip] = field(default_factory=list)
    num_unreadable: int = 0
    num_bytes: int = 0
    _numbers: dict[str, array[float]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Sequence[float]:
        """Return a column as long as ``steps``; NaN where a line has no finite number."""
        return self._numbers[name] if name in self._numbers else array("d", [math.nan]) * len(self.steps)

    def has(self, name: str) -> bool:
        """Return whether any line has a finite number in this column."""
        return name in self._numbers

    def last(self, name: str) -> float | None:
        """Return the last finite number of a column; None without one."""
        return next((value for value in reversed(self[name]) if math.isfinite(value)), None)


def read_columns(path: Path) -> Columns:
    """Read the complete lines of metrics.jsonl.

    Of lines with the same step the last one counts. Numbers out of the range of a float are NaN.

    Raises:
        OSError: The file cannot be read. A missing file has no lines.
    """
    try:
        data = read_regular(path, limit=LARGEST_LOG)
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
