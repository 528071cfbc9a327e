"""metrics.jsonl as columns of numbers, by step. Accepts any content and ignores an incomplete last line."""

from __future__ import annotations

import errno
import json
import math
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
from numpy.typing import NDArray

from bigbatch.lm.files import LARGEST_LOG, open_regular

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
    "accuracy",
    "margin",
    "validation_loss",
    "validation_perplexity",
    "validation_accuracy",
    "validation_margin",
    "retries",
    "noise_scale_items",
    "noise_scale_sequences",
    "noise_low_sequences",
    "noise_high_sequences",
    "sequences",
    "global_batch",
    "ranks",
    "slowest_rank",
    "slowest_share",
)
"""Keys of a line that are drawn; NaN if the line has no finite number there."""

BLOCK_BYTES = 2**22
LARGEST_STEP = 2**62
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

    def finite(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the steps of the lines with a finite number in this column, and the numbers."""
        steps, values = np.asarray(self.steps), np.asarray(self[name])
        is_finite = ~np.isnan(values)
        return steps[is_finite], values[is_finite]

    def last(self, name: str) -> float | None:
        """Return the last finite number of a column; None without one."""
        return next((value for value in reversed(self[name]) if math.isfinite(value)), None)

    def lowest(self, name: str) -> float | None:
        """Return the lowest number of a column; None without one."""
        return min((value for value in self[name] if math.isfinite(value)), default=None)

    def highest(self, name: str) -> float | None:
        """Return the highest number of a column; None without one."""
        return max((value for value in self[name] if math.isfinite(value)), default=None)


def read_columns(path: Path) -> Columns:
    """Read the complete lines of metrics.jsonl, `BLOCK_BYTES` at a time.

    Of lines with the same step the last one counts. Numbers out of the range of a float are NaN.

    Raises:
        OSError: The file cannot be read. A missing file has no lines.
    """
    found = Columns()
    blocks: list[_Block] = []
    try:
        for data in _complete_lines(path):
            found.num_bytes += len(data)
            block = _parsed_by_arrow(data) or _parsed_by_python(data)
            found.num_unreadable += block.num_unreadable
            blocks.append(block)
    except FileNotFoundError:
        pass
    steps = np.concatenate([np.zeros(0, np.int64), *(block.steps for block in blocks)])
    order = _last_of_each(steps)
    found.steps.frombytes(steps[order].tobytes())
    found.skipped = _skips(blocks, steps, order)
    for name in NUMBERS:
        parts = [block.numbers.pop(name) if name in block.numbers else _missing(block) for block in blocks]
        column = np.concatenate([np.zeros(0), *parts])[order]
        if not np.isnan(column).all():
            found._numbers[name] = array("d", column.tobytes())
    return found


@dataclass(frozen=True)
class _Block:
    """Consecutive lines: the step of each record, its numbers by name (none if all are missing), and reasons by row."""

    steps: NDArray[np.int64]
    numbers: dict[str, NDArray[np.float64]]
    skipped: dict[int, str]
    num_unreadable: int


def _complete_lines(path: Path) -> Iterator[bytes]:
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > LARGEST_LOG:
            raise OSError(errno.EFBIG, f"it has {num_bytes:,} bytes, and at most {LARGEST_LOG:,} are read", str(path))
        rest = b""
        while data := file.read(BLOCK_BYTES):
            data = rest + data
            end = data.rfind(b"\n") + 1
            rest = data[end:]
            if end:
                yield data[:end]


def _parsed_by_arrow(data: bytes) -> _Block | None:
    """Parse lines as what `bigbatch.lm.runs.directory` writes; None if any line is something else."""
    # Arrow separates records by any white space: as many records as lines could be two in one line, and a blank one.
    num_lines, num_starts = data.count(b"\n"), data.count(b"\n{") + data.startswith(b"{")
    if not data.isascii() or b"\r" in data or not num_lines == num_starts == data.count(b"}\n"):
        return None
    schema = pa.schema([("step", pa.int64()), ("skipped", pa.string()), *((name, pa.float64()) for name in NUMBERS)])
    options = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        table = pa.json.read_json(pa.BufferReader(data), parse_options=options)
    except pa.ArrowException:
        return None
    steps = table.column("step")
    if table.num_rows != num_lines or steps.null_count:
        return None
    whole = _values(steps, np.dtype(np.int64))
    if whole.min() < 0 or whole.max() >= LARGEST_STEP:
        return None
    skipped = table.column("skipped")
    numbers = {}
    for name in NUMBERS:
        column = table.column(name)
        if column.null_count < len(column):
            values = _values(column, np.dtype(np.float64))
            numbers[name] = np.where(np.abs(values) <= LARGEST, values, math.nan)
    reasons = skipped.to_pylist() if skipped.null_count < len(skipped) else []
    return _Block(whole, numbers, {row: reason for row, reason in enumerate(reasons) if reason}, 0)


def _values(column: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return a column, NaN where it is null. Not by ``to_numpy``, which imports pandas first."""
    parts = []
    for chunk in column.chunks:
        marks, values = chunk.buffers()
        part = np.frombuffer(values, dtype)[chunk.offset : chunk.offset + len(chunk)]
        if chunk.null_count:
            bits = np.unpackbits(np.frombuffer(marks, np.uint8), bitorder="little")
            part = np.where(bits[chunk.offset : chunk.offset + len(chunk)], part, math.nan)
        parts.append(part)
    return np.concatenate(parts)


def _parsed_by_python(data: bytes) -> _Block:
    rows: list[dict[str, Any]] = []
    num_unreadable = 0
    for line in data.splitlines():
        row = _row(line)
        if row is None:
            num_unreadable += bool(line.strip())
        else:
            rows.append(row)
    numbers = {name: np.array([_number(row.get(name)) for row in rows], np.float64) for name in NUMBERS}
    reasons = {i: str(row["skipped"]) for i, row in enumerate(rows) if row.get("skipped")}
    return _Block(np.array([row["step"] for row in rows], np.int64), numbers, reasons, num_unreadable)


def _last_of_each(steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the places of the last line of each step, by step."""
    order = np.argsort(steps, kind="stable")
    ordered = steps[order]
    return order[np.append(ordered[1:] != ordered[:-1], True)] if len(steps) else order


def _skips(blocks: Sequence[_Block], steps: NDArray[np.int64], order: NDArray[np.int64]) -> list[Skip]:
    """Return the skipped updates by step; a later line replaces an earlier one of the same step."""
    counts = np.zeros(len(steps), np.bool_)
    counts[order] = True
    found, first = [], 0
    for block in blocks:
        for row, reason in block.skipped.items():
            if counts[first + row]:
                found.append(Skip(int(steps[first + row]), reason))
        first += len(block.steps)
    return sorted(found, key=lambda skip: skip.step)


def _missing(block: _Block) -> NDArray[np.float64]:
    return np.full(len(block.steps), math.nan)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < LARGEST_STEP:
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
