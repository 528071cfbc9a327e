"""What a run says about its batch: how it stands to the noise scale, what accumulating costs, if a smaller one pays.

metrics.jsonl and config.json → Evidence → Advice, in sentences

Under the model of McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, section 2.4, a loss takes

    samples = least samples · (1 + batch / scale)        updates = least updates · (1 + scale / batch)

so that a batch far below the scale wastes updates, and one far above it wastes samples. No torch here.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bigbatch.errors import InputError
from bigbatch.lm.config.scale_from import BETAS
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.files import os_reason
from bigbatch.lm.runs.file_names import CONFIG, METRICS

FAR = 4.0  # times the scale, or of it: beyond, one of the two is mostly wasted
LATEST = 50  # updates whose times and batches are looked at

Verdict = Literal["far below", "near", "far above", "unknown"]


@dataclass(frozen=True)
class RunEvidence:
    """What a run has measured.

    Attributes:
        step: Updates done.
        batch: Sequences behind an update by now.
        microbatches: Of one update.
        update_s: Seconds of an update; None where the run kept no clock.
        scale: The noise scale in sequences; None where it is not known, infinite where no signal was found.
        low: Lower end of its interval.
        high: Upper end.
        beta2: Of AdamW.
    """

    step: int
    batch: float
    microbatches: int
    update_s: float | None
    scale: float | None
    low: float | None
    high: float | None
    beta2: float = BETAS[1]


@dataclass(frozen=True)
class Advice:
    """What to make of it.

    Attributes:
        verdict: How the batch stands to the noise scale.
        sentences: In plain words, the most important first.
        smaller_batch: Sequences of one micro-batch, where a batch of so few would reach the loss sooner; else None.
        gain: How many times sooner, by the model above; 1 where it would not.
    """

    verdict: Verdict
    sentences: tuple[str, ...]
    smaller_batch: int | None = None
    gain: float = 1.0


def read_evidence(folder: Path) -> RunEvidence:
    """Read what a run has measured.

    Raises:
        InputError: There is no run, or it has made no update yet.
    """
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").split("\n")
        config = TrainConfig.model_validate(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is no run that can be read: {os_reason(error)}.") from error
    rows = [row for row in map(_row, lines) if row is not None]
    if not rows:
        raise InputError(f"{folder} has made no update yet: there is nothing to go by.")
    return evidence(rows, config)


def evidence(rows: Sequence[Mapping[str, Any]], config: TrainConfig) -> RunEvidence:
    """Take what counts from the lines of metrics.jsonl."""
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
    )


def _batch(latest: Sequence[Mapping[str, Any]], config: TrainConfig) -> float:
    """Give the batch by now, in sequences: as asked for, where the last window of a pass took what was left."""
    asked = latest[-1].get("global_batch") or config.global_batch
    return float(asked or statistics.median(row.get("sequences") or 0 for row in latest))


def advise(found: RunEvidence) -> Advice:
    """Say what the evidence means."""
    verdict = classify(found)
    sentences = [_compare_with_scale(found, verdict), _cost(found)]
    smaller, gain = _smaller(found)
    if verdict != "unknown":
        sentences.append(_of_a_smaller_one(found, smaller, gain))
    sentences.append(
        "The noise scale is a guide and not an oracle: it grows as the loss falls, it says nothing of generalization, "
        "and its model takes every direction for alike. --branch trains a little at several batches and compares."
    )
    return Advice(verdict, tuple(sentences), smaller if gain > 1.05 else None, gain)


def classify(found: RunEvidence) -> Verdict:
    """Tell how the batch stands to the noise scale, as far as its interval lets one."""
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
    """Say the most important of it, for the end of a run; None where nothing is known."""
    verdict = classify(found)
    if verdict == "unknown":
        return None
    means = {
        "far below": "a larger batch would lose few samples",
        "near": "about as large as pays",
        "far above": "a smaller one would learn as much from fewer samples",
    }[verdict]
    return f"batch: {_rounded(found.batch)} sequences, {verdict} the gradient noise scale {_scale(found)}: {means}"


def _compare_with_scale(found: RunEvidence, verdict: Verdict) -> str:
    if verdict == "unknown":
        why = (
            "is not known: it takes updates of at least two micro-batches, a loss of one term, and no float16"
            if found.scale is None
            else "cannot be told from these updates: the noise hides the signal. More of them will narrow it"
        )
        return f"After {found.step:,} updates the gradient noise scale {why}."
    means = {
        "far below": "nearly every sample counts in full, and twice the batch would need about half the updates",
        "near": "it takes about twice the fewest samples and twice the fewest updates, which is the usual compromise",
        "far above": "most of its samples repeat what the others say: a smaller batch would need fewer samples",
    }[verdict]
    return (
        f"The batch of {_rounded(found.batch)} sequences is {verdict} the gradient noise scale, {_scale(found)}: "
        f"{means}."
    )


def _cost(found: RunEvidence) -> str:
    if found.microbatches == 1:
        return "An update is one micro-batch here: nothing is accumulated, and a smaller batch would save no memory."
    time = "" if found.update_s is None else f" and {found.update_s:.3g} s"
    one = "" if found.update_s is None else f", about {found.update_s / found.microbatches:.2g} s each"
    return (
        f"An update takes {found.microbatches:,} micro-batches{time} here: accumulating costs time and no memory, and "
        f"a batch of one micro-batch would make {found.microbatches:,} updates of them{one}."
    )


def _smaller(found: RunEvidence) -> tuple[int, float]:
    """Give the sequences of one micro-batch, and how many times fewer samples a batch of so many would take."""
    smaller = max(1, round(found.batch / found.microbatches))
    if found.scale is None or math.isinf(found.scale) or found.scale <= 0:
        return smaller, 1.0
    return smaller, (1 + found.batch / found.scale) / (1 + smaller / found.scale)


def _of_a_smaller_one(found: RunEvidence, smaller: int, gain: float) -> str:
    if gain <= 1.05:
        return (
            "On this machine, where samples cost the same in any batch, a smaller batch would reach the same loss no "
            "sooner than 5 % earlier: the batch costs nothing."
        )
    factor = smaller / found.batch
    return (
        f"On this machine, where samples cost the same in any batch, a batch of {smaller:,} would reach the same loss "
        f"about {gain:.2g} times sooner, with beta2 {found.beta2:g} → {found.beta2**factor:.4g} (the same half-life in "
        f"samples) and the learning rate × {math.sqrt(factor):.2g}: bigbatch train --global-batch {smaller} "
        f"--scale-from {round(found.batch)} --lr-rule sqrt+half-life. The larger batch pays where it is spread over "
        "more machines."
    )


def _scale(found: RunEvidence) -> str:
    assert found.scale is not None, "told only where it is known"
    about = "too large to tell" if math.isinf(found.scale) else f"about {_rounded(found.scale)} sequences"
    low = _rounded(found.low or 0.0)
    if found.high is None or math.isinf(found.high):
        return f"{about} (at least {low})"
    return f"{about} ({low} to {_rounded(found.high)})"


def _rounded(number: float) -> str:
    """Write a number with three digits that count, and commas."""
    if number < 10:
        return f"{number:.2g}"
    digits = max(0, math.floor(math.log10(number)) - 2)
    return f"{round(number / 10**digits) * 10**digits:,}"


def _number(value: Any, row: Mapping[str, Any]) -> float | None:
    """Read the scale; where a line has a lower end and no scale, it was infinite."""
    if value is None:
        return math.inf if row.get("noise_low_sequences") is not None else None
    return float(value)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"step", "num_microbatches"} <= row.keys() else None
