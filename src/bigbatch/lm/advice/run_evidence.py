"""Read the evidence of a run: its batch, its times and the gradient noise scale it measured.

metrics.jsonl, of which usually only the end is read, and config.json → RunEvidence. Does not import torch.
"""

import errno
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from bigbatch.errors import InputError, os_reason
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.files import LARGEST_LOG, file_kind, open_regular, parse_json, read_json
from bigbatch.lm.runs.file_names import CONFIG, METRICS
from bigbatch.lm.runs.identity import check_layout
from bigbatch.lm.text import SAMPLE_NOUNS, describe_invalid
from bigbatch.scaling.noise_scale import MIN_WINDOWS

if TYPE_CHECKING:
    from bigbatch.lm.report.metrics_table import Columns

TAIL_BYTES = 2**18  # of metrics.jsonl that are read first, for these updates
LATEST = 50  # most recent updates, whose times and batches count

NUMBERS = frozenset(
    ["step", "num_microbatches", "sequences", "global_batch", "elapsed_s", "ranks", "retries"]
    + [f"noise_{name}_sequences" for name in ("scale", "low", "high")]
)
"""Fields of a row of metrics.jsonl that are numbers, or missing."""

LARGEST_NUMBER = 2**62  # in a row; larger ones are ignored


@dataclass(frozen=True)
class RunEvidence:
    """Measurements of a run.

    Attributes:
        step: Updates done.
        batch: Sequences per update, currently.
        microbatches: Micro-batches per update.
        update_s: Seconds per update; None if the run recorded no times.
        scale: The noise scale in sequences; None if unknown, infinite if no signal was found.
        low: Lower bound of its confidence interval.
        high: Upper bound.
        beta2: Second-moment decay of AdamW; None for other optimizers.
        noun: What a sample of the objective is.
        missing: Why the scale is unknown, as the end of a sentence; None if it is known, or the reason is not.
    """

    step: int
    batch: float
    microbatches: int
    update_s: float | None
    scale: float | None
    low: float | None
    high: float | None
    beta2: float | None = None
    noun: str = "sequence"
    missing: str | None = None


def read_evidence(folder: Path) -> RunEvidence:
    """Read the evidence of a run directory.

    Raises:
        InputError: The folder is not a readable run, has a newer layout, or the run has no updates yet.
    """
    for path in (folder / METRICS, folder / CONFIG):
        if path.exists() and not path.is_file():  # reading a pipe may wait for ever
            raise InputError(f"{folder} is not a readable run: {path.name} is {file_kind(path)}.")
    check_layout(folder)
    try:
        rows = _latest_rows(folder / METRICS)
        config = TrainConfig.model_validate(read_json(folder / CONFIG))
    except ValidationError as error:
        reason = describe_invalid(error.errors(include_url=False)[0])
        raise InputError(f"{folder} is not a readable run: {CONFIG} has an invalid value ({reason}).") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not a readable run: {os_reason(error)}.") from error
    if not rows:
        raise InputError(f"{folder} has no updates yet. Run bigbatch advise after the first update.")
    return evidence(rows, config, all_rows=lambda: _counts_in(folder / METRICS))


@dataclass(frozen=True)
class UpdateCounts:
    """Counts of the updates of a run.

    Attributes:
        applied: Updates that were not skipped.
        divided: Of these, those of several micro-batches.
        usable: Of these, those without an out-of-memory retry.
    """

    applied: int
    divided: int
    usable: int


def _counts_in(path: Path) -> UpdateCounts:
    from bigbatch.lm.report.metrics_table import read_columns

    return count_updates(read_columns(path))


def count_updates(columns: "Columns") -> UpdateCounts:
    """Count the updates in the columns of metrics.jsonl."""
    import numpy as np

    microbatches = np.asarray(columns["num_microbatches"], np.float64)
    applied = ~np.isnan(microbatches) & ~np.isin(np.asarray(columns.steps), [skip.step for skip in columns.skipped])
    divided = applied & (np.nan_to_num(microbatches) >= 2)
    usable = divided & ~(np.nan_to_num(np.asarray(columns["retries"], np.float64)) != 0)
    return UpdateCounts(int(applied.sum()), int(divided.sum()), int(usable.sum()))


def _counts_of(rows: Sequence[Mapping[str, Any]]) -> UpdateCounts:
    applied = [row for row in rows if not row.get("skipped")]
    divided = [row for row in applied if int(row["num_microbatches"]) > 1]
    return UpdateCounts(len(applied), len(divided), sum(not row.get("retries") for row in divided))


def evidence(
    rows: Sequence[Mapping[str, Any]], config: TrainConfig, *, all_rows: Callable[[], UpdateCounts] | None = None
) -> RunEvidence:
    """Extract the evidence from the rows of metrics.jsonl.

    Args:
        rows: All of them, or at least the last ``LATEST``.
        config: Of the run.
        all_rows: Returns the counts of all rows, if ``rows`` are not all; called only if they are needed.
    """
    latest = rows[-LATEST:]
    last = rows[-1]
    times = [row["elapsed_s"] for row in latest if row.get("elapsed_s")]
    return RunEvidence(
        step=int(last["step"]),
        batch=_batch(latest, config),
        microbatches=max(1, round(statistics.median(int(row["num_microbatches"]) for row in latest))),
        update_s=statistics.median(times) if times else None,
        scale=_number(last.get("noise_scale_sequences"), last),
        low=last.get("noise_low_sequences"),
        high=last.get("noise_high_sequences"),
        beta2=config.optimizer_settings()["beta2"] if config.optimizer == "adamw" else None,
        noun=SAMPLE_NOUNS[config.objective],
        missing=_missing(last, config, all_rows or (lambda: _counts_of(rows))),
    )


def _latest_rows(path: Path) -> list[dict[str, Any]]:
    """Return the last ``LATEST`` rows of metrics.jsonl, or all of them if they are fewer; reads only the end."""
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > LARGEST_LOG:
            raise OSError(errno.EFBIG, f"it has {num_bytes:,} bytes, and at most {LARGEST_LOG:,} are read", str(path))
        tail_bytes = TAIL_BYTES
        while True:
            start = max(0, num_bytes - tail_bytes)
            file.seek(start)
            lines = file.read(num_bytes - start).split(b"\n")[start > 0 :]  # the first one may be incomplete
            rows = [row for row in map(_row, lines) if row is not None]
            if start == 0 or len(rows) >= LATEST:
                return rows[-LATEST:]
            tail_bytes *= 4


def _missing(last: Mapping[str, Any], config: TrainConfig, all_rows: Callable[[], UpdateCounts]) -> str | None:
    """Return which condition of a measurement a run does not meet; None if the scale is known, or they are all met."""
    if _number(last.get("noise_scale_sequences"), last) is not None:
        return None
    if config.precision == "fp16":
        return "it is not measured with --precision fp16, whose gradients are scaled. Train with bf16 or float32"
    if last.get("ranks", 1) > 1 and config.parallel in ("fsdp", "hsdp"):
        return f"it is not measured for a model that is sharded with --parallel {config.parallel}"
    counts = all_rows()
    if not counts.applied:
        return f"every update was skipped ({last['skipped']})"
    if not counts.divided:
        return "it compares micro-batches, and every update is a single one. Train with a smaller --microbatch"
    if counts.divided >= MIN_WINDOWS > counts.usable:
        return "micro-batches ran out of memory and were repeated in smaller pieces. Train with a smaller --microbatch"
    if counts.usable < MIN_WINDOWS:
        return f"it needs {MIN_WINDOWS} updates of at least two micro-batches, and the run has {counts.usable}"
    return None


def _batch(latest: Sequence[Mapping[str, Any]], config: TrainConfig) -> float:
    """Return the current batch in sequences: the configured one, since the last window of an epoch may be smaller."""
    asked = latest[-1].get("global_batch") or config.global_batch
    return float(asked or statistics.median(row.get("sequences") or 0 for row in latest))


def _number(value: Any, row: Mapping[str, Any]) -> float | None:
    """Return the scale; infinite if the row has a lower bound and no scale."""
    if value is None:
        return math.inf if row.get("noise_low_sequences") is not None else None
    return float(value)


def _row(line: bytes) -> dict[str, Any] | None:
    """Return a row of metrics.jsonl without those of its numbers that are none; None if it is no row of an update."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    row = {name: value for name, value in row.items() if name not in NUMBERS or _is_number(value)}
    return row if {"step", "num_microbatches"} <= row.keys() else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER
