"""Advice on the batch of a run: its ratio to the noise scale, the cost of accumulation, and smaller batches.

RunEvidence → Advice

Model of McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, section 2.4. To reach a loss takes

    samples = minimum samples · (1 + batch / scale)      updates = minimum updates · (1 + scale / batch)

so a batch far below the scale wastes updates, and one far above it wastes samples. Does not import torch.
"""

import math
from dataclasses import dataclass
from typing import Literal

from bigbatch.lm.advice.run_evidence import RunEvidence
from bigbatch.lm.text import plural

FAR = 4.0  # ratio of batch and scale beyond which samples or updates are mostly wasted
Verdict = Literal["far below", "near", "far above", "unknown"]
Position = Literal["far below", "below", "near", "above", "far above", "unknown"]


@dataclass(frozen=True)
class Advice:
    """Conclusions from the evidence.

    Attributes:
        verdict: The batch compared with the noise scale; ``near`` is within a factor of `FAR`.
        sentences: The advice, the most important first.
        smaller_batch: Sequences of one micro-batch if a batch of that size would reach the loss sooner; else None.
        gain: Speed-up of that batch in the model above; 1 if there is none.
    """

    verdict: Verdict
    sentences: tuple[str, ...]
    smaller_batch: int | None = None
    gain: float = 1.0


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
    """Compare the batch with the noise scale; unknown if the batch is far above one end of the confidence interval of
    the scale and far below the other.
    """
    if found.scale is None or not found.batch:
        return "unknown"
    low, high = found.low or 0.0, math.inf if found.high is None else found.high
    if found.batch * FAR < low:
        return "far below"
    if found.batch > FAR * high:
        return "far above"
    if math.isinf(found.scale) or (found.batch > FAR * low and found.batch * FAR < high):
        return "unknown"
    ratio = found.batch / found.scale if found.scale > 0 else math.inf
    return "far below" if ratio < 1 / FAR else "far above" if ratio > FAR else "near"


def one_line(found: RunEvidence) -> str | None:
    """Return the main conclusion in one line, for the end of a run; None if the noise scale is unknown."""
    verdict = classify(found)
    if verdict == "unknown":
        return None
    position = _position(found, verdict)
    means = {
        "far below": "a larger batch would need few additional samples",
        "below": "a larger one would need fewer updates",
        "near": "about as large as is efficient",
        "above": "a smaller one would need fewer samples",
        "far above": "a smaller one would need fewer samples",
    }[position]
    where = _where(found, position)
    return f"batch: {_rounded(found.batch)} {found.noun}s, {where} the gradient noise scale {_scale(found)}: {means}"


def _position(found: RunEvidence, verdict: Verdict) -> Position:
    """Return the verdict; of a batch within a factor of `FAR`, on which side of the confidence interval it is."""
    if verdict != "near":
        return verdict
    if found.batch < (found.low or 0.0):
        return "below"
    return "above" if found.high is not None and found.batch > found.high else "near"


def _where(found: RunEvidence, position: Position) -> str:
    """Return the position in words; of a batch outside of the interval, but not far from it, as a factor."""
    if position in ("below", "above"):
        assert found.scale is not None, "the scale of a near batch is known"
        return f"{found.batch / found.scale:.2f} times"
    return position


def _compare_with_scale(found: RunEvidence, verdict: Verdict) -> str:
    if verdict == "unknown":
        if found.scale is not None and not found.batch:
            why = f"cannot be compared with the batch: the run did not record its {found.noun}s"
        elif found.scale is not None and found.high is not None and not math.isinf(found.high):
            low, high = _rounded(found.low or 0.0), _rounded(found.high)
            why = f"is between {low} and {high} {found.noun}s, too uncertain to compare with the batch of "
            why += f"{_rounded(found.batch)}. More updates narrow the estimate"
        elif found.scale is not None:
            why = "cannot be estimated yet: the noise hides the signal. More updates narrow the estimate"
        else:
            why = f"is unknown: {found.missing or 'the run did not record it'}"
        return f"After {plural(found.step, 'update')} the gradient noise scale {why}."
    position = _position(found, verdict)
    if verdict == "near":
        assert found.scale is not None, "the scale of a near batch is known"
        samples, updates = 1 + found.batch / found.scale, 1 + found.scale / found.batch
        means = f"about {samples:.2g}× the minimum number of samples and {updates:.2g}× the minimum number of updates"
        means += ", a common trade-off" if position == "near" else ""
    elif verdict == "far below":
        means = "twice the batch would need about half the updates and few additional samples"
    else:
        means = "most of its samples are redundant, and a smaller batch would need fewer samples"
    return (
        f"The batch of {_rounded(found.batch)} {found.noun}s is {_where(found, position)} the gradient noise scale, "
        f"{_scale(found)}: {means}."
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
    if found.scale is None or math.isinf(found.scale):
        return smaller, 1.0
    if found.scale <= 0:  # the limit of the ratio below
        return smaller, found.batch / smaller
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
    about = "too large to estimate" if math.isinf(found.scale) else f"about {_rounded(found.scale)} {found.noun}s"
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
