"""Advice on the batch of a run: its ratio to the noise scale, the cost of accumulation, and smaller batches.

metrics.jsonl and config.json → RunEvidence → Advice

Model of McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, section 2.4. To reach a loss takes

    samples = minimum samples · (1 + batch / scale)      updates = minimum updates · (1 + scale / batch)

so a batch far below the scale wastes updates, and one far above it wastes samples. Does not import torch.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from bigbatch.errors import InputError, os_reason
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.files import LARGEST_LOG, file_kind, parse_json, read_json, read_regular
from bigbatch.lm.runs.file_names import CONFIG, METRICS
from bigbatch.lm.runs.identity import check_layout
from bigbatch.lm.text import describe_invalid, plural
from bigbatch.scaling.noise_scale import MIN_WINDOWS

FAR = 4.0  # ratio of batch and scale beyond which samples or updates are mostly wasted
LATEST = 50  # most recent updates, whose times and batches count

NUMBERS = frozenset(
    ["step", "num_microbatches", "sequences", "global_batch", "elapsed_s", "ranks", "retries"]
    + [f"noise_{name}_sequences" for name in ("scale", "low", "high")]
)
"""Fields of a row of metrics.jsonl that are numbers, or missing."""

LARGEST_NUMBER = 2**62  # in a row; larger ones are ignored
Verdict = Literal["far below", "near", "far above", "unknown"]


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
    missing: str | None = None


@dataclass(frozen=True)
class Advice:
    """Conclusions from the evidence.

    Attributes:
        verdict: The batch compared with the noise scale.
        sentences: The advice, the most important first.
        smaller_batch: Sequences of one micro-batch if a batch of that size would reach the loss sooner; else None.
        gain: Speed-up of that batch in the model above; 1 if there is none.
    """

    verdict: Verdict
    sentences: tuple[str, ...]
    smaller_batch: int | None = None
    gain: float = 1.0


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
        lines = read_regular(folder / METRICS, limit=LARGEST_LOG).split(b"\n")
        config = TrainConfig.model_validate(read_json(folder / CONFIG))
    except ValidationError as error:
        reason = describe_invalid(error.errors(include_url=False)[0])
        raise InputError(f"{folder} is not a readable run: {CONFIG} has an invalid value ({reason}).") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not a readable run: {os_reason(error)}.") from error
    rows = [row for row in map(_row, lines) if row is not None]
    if not rows:
        raise InputError(f"{folder} has no updates yet. Run bigbatch advise after the first update.")
    return evidence(rows, config)


def evidence(rows: Sequence[Mapping[str, Any]], config: TrainConfig) -> RunEvidence:
    """Extract the evidence from the rows of metrics.jsonl."""
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
        beta2=config.optimizer_settings()["beta2"] if config.optimizer == "adamw" else None,
        high=last.get("noise_high_sequences"),
        missing=_missing(rows, config),
    )


def _missing(rows: Sequence[Mapping[str, Any]], config: TrainConfig) -> str | None:
    """Return which condition of a measurement a run does not meet; None if the scale is known, or they are all met."""
    last = rows[-1]
    if _number(last.get("noise_scale_sequences"), last) is not None:
        return None
    if config.precision == "fp16":
        return "it is not measured with --precision fp16, whose gradients are scaled. Train with bf16 or float32"
    if last.get("ranks", 1) > 1 and config.parallel in ("fsdp", "hsdp"):
        return f"it is not measured for a model that is sharded with --parallel {config.parallel}"
    applied = [row for row in rows if not row.get("skipped")]
    if not applied:
        return f"every update was skipped ({last['skipped']})"
    divided = [row for row in applied if int(row["num_microbatches"]) > 1]
    if not divided:
        return "it compares micro-batches, and every update is a single one. Train with a smaller --microbatch"
    usable = [row for row in divided if not row.get("retries")]
    if len(divided) >= MIN_WINDOWS > len(usable):
        return "micro-batches ran out of memory and were repeated in smaller pieces. Train with a smaller --microbatch"
    if len(usable) < MIN_WINDOWS:
        return f"it needs {MIN_WINDOWS} updates of at least two micro-batches, and the run has {len(usable)}"
    return None


def _batch(latest: Sequence[Mapping[str, Any]], config: TrainConfig) -> float:
    """Return the current batch in sequences: the configured one, since the last window of an epoch may be smaller."""
    asked = latest[-1].get("global_batch") or config.global_batch
    return float(asked or statistics.median(row.get("sequences") or 0 for row in latest))


def advise(found: RunEvidence) -> Advice:
    """Return the advice for the evidence."""
    verdict = classify(found)
    sentences = [_compare_with_scale(found, verdict), _cost(found)]
    smaller, gain = _smaller(found)
    if verdict != "unknown":
        sentences.append(_compare_with_smaller(found, smaller, gain))
    sentences.append(
        "This is an estimate: the noise scale grows as the loss falls, assumes isotropic curvature and says nothing "
        "about generalization. --branch measures it with short runs at several batches."
    )
    return Advice(verdict, tuple(sentences), smaller if gain > 1.05 else None, gain)


def classify(found: RunEvidence) -> Verdict:
    """Compare the batch with the noise scale, within its confidence interval."""
    if found.scale is None or not found.batch:
        return "unknown"
    low, high = found.low or 0.0, math.inf if found.high is None else found.high
    if found.batch * FAR < low:
        return "far below"
    if found.batch > FAR * high:
        return "far above"
    if math.isinf(found.scale) or (math.isinf(high) and found.batch * FAR >= low and low == 0.0):
        return "unknown"
    ratio = found.batch / found.scale
    return "far below" if ratio < 1 / FAR else "far above" if ratio > FAR else "near"


def one_line(found: RunEvidence) -> str | None:
    """Return the main conclusion in one line, for the end of a run; None if the noise scale is unknown."""
    verdict = classify(found)
    if verdict == "unknown":
        return None
    means = {
        "far below": "a larger batch would need few additional samples",
        "near": "about as large as is efficient",
        "far above": "a smaller one would need fewer samples",
    }[verdict]
    return f"batch: {_rounded(found.batch)} sequences, {verdict} the gradient noise scale {_scale(found)}: {means}"


def _compare_with_scale(found: RunEvidence, verdict: Verdict) -> str:
    if verdict == "unknown":
        if found.scale is not None and not found.batch:
            why = "cannot be compared with the batch: the run did not record its sequences"
        elif found.scale is not None:
            why = "cannot be estimated yet: the noise hides the signal. More updates narrow the estimate"
        else:
            why = f"is unknown: {found.missing or 'the run did not record it'}"
        return f"After {plural(found.step, 'update')} the gradient noise scale {why}."
    means = {
        "far below": "twice the batch would need about half the updates and few additional samples",
        "near": "about 2× the minimum number of samples and 2× the minimum number of updates, a common trade-off",
        "far above": "most of its samples are redundant, and a smaller batch would need fewer samples",
    }[verdict]
    return (
        f"The batch of {_rounded(found.batch)} sequences is {verdict} the gradient noise scale, {_scale(found)}: "
        f"{means}."
    )


def _cost(found: RunEvidence) -> str:
    if found.microbatches == 1:
        return "An update is one micro-batch: nothing is accumulated, and a smaller batch would save no memory."
    time = "" if found.update_s is None else f" and {found.update_s:.3g} s"
    one = "" if found.update_s is None else f", about {found.update_s / found.microbatches:.2g} s each"
    return (
        f"An update takes {found.microbatches:,} micro-batches{time}: accumulation costs time and no memory, and a "
        f"batch of one micro-batch would make {found.microbatches:,} updates of them{one}."
    )


def _smaller(found: RunEvidence) -> tuple[int, float]:
    """Return the sequences of one micro-batch, and the factor by which that batch needs fewer samples."""
    smaller = max(1, round(found.batch / found.microbatches))
    if found.scale is None or math.isinf(found.scale) or found.scale <= 0:
        return smaller, 1.0
    return smaller, (1 + found.batch / found.scale) / (1 + smaller / found.scale)


def _compare_with_smaller(found: RunEvidence, smaller: int, gain: float) -> str:
    if gain <= 1.05:
        return (
            "On this machine, where samples cost the same in any batch, a smaller batch would reach the same loss less "
            "than 5 % sooner: keep the batch."
        )
    factor = smaller / found.batch
    if found.beta2 is None:
        change = f"with a lower learning rate, to be tuned: bigbatch train --global-batch {smaller}"
    else:
        change = (
            f"with beta2 {found.beta2:g} → {found.beta2**factor:.4g} (the same half-life in samples) and the learning "
            f"rate × {math.sqrt(factor):.2g}: bigbatch train --global-batch {smaller} --scale-from "
            f"{round(found.batch)} --lr-rule sqrt+half-life"
        )
    return (
        f"On this machine, where samples cost the same in any batch, a batch of {smaller:,} would reach the same loss "
        f"about {gain:.2g} times sooner, {change}. The larger batch is worthwhile on more machines."
    )


def _scale(found: RunEvidence) -> str:
    assert found.scale is not None, "called only with a known scale"
    about = "too large to estimate" if math.isinf(found.scale) else f"about {_rounded(found.scale)} sequences"
    low = _rounded(found.low or 0.0)
    if found.high is None or math.isinf(found.high):
        return f"{about} (at least {low})"
    return f"{about} ({low} to {_rounded(found.high)})"


def _rounded(number: float) -> str:
    """Format a number with three significant digits and commas."""
    if number < 10:
        return f"{number:.2g}"
    digits = max(0, math.floor(math.log10(number)) - 2)
    return f"{round(number / 10**digits) * 10**digits:,}"


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
