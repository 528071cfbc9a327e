"""Advice from extreme measurements of the noise scale."""

import math
from dataclasses import replace

from bigbatch.lm.advice.batch_advice import advise, classify, one_line
from bigbatch.lm.advice.run_evidence import RunEvidence


def found(scale: float | None, low: float | None = 0.0, high: float | None = math.inf) -> RunEvidence:
    return RunEvidence(step=54, batch=16.0, microbatches=4, update_s=0.5, scale=scale, low=low, high=high, beta2=0.95)


def test_batch_is_far_above_a_noise_scale_of_zero() -> None:
    no_noise = found(0.0, high=40.0)
    assert classify(no_noise) == "far above"
    assert one_line(no_noise) == (
        "batch: 16 sequences, far above the gradient noise scale about 0 sequences (0 to 40): a smaller one would need "
        "fewer samples"
    )
    assert "about 4 times sooner" in " ".join(advise(no_noise).sentences)


def evidence_of_batch(batch: float) -> RunEvidence:
    return replace(found(9.1, low=5.8, high=15.0), batch=batch)


def test_batch_outside_of_interval_is_not_near() -> None:
    above, below = evidence_of_batch(32.0), evidence_of_batch(4.0)
    assert classify(above) == classify(below) == "near"  # within the factor of 4
    assert one_line(above) == (
        "batch: 32 sequences, 3.52 times the gradient noise scale about 9.1 sequences (5.8 to 15): a smaller one would "
        "need fewer samples"
    )
    assert advise(above).sentences[0] == (
        "The batch of 32 sequences is 3.52 times the gradient noise scale, about 9.1 sequences (5.8 to 15): about 4.5× "
        "the minimum number of samples and 1.3× the minimum number of updates."
    )
    assert one_line(below) == (
        "batch: 4 sequences, 0.44 times the gradient noise scale about 9.1 sequences (5.8 to 15): a larger one would "
        "need fewer updates"
    )
    assert advise(below).sentences[0] == (
        "The batch of 4 sequences is 0.44 times the gradient noise scale, about 9.1 sequences (5.8 to 15): about 1.4× "
        "the minimum number of samples and 3.3× the minimum number of updates."
    )


def test_batch_within_interval_is_near() -> None:
    within = evidence_of_batch(9.1)
    assert one_line(within) == (
        "batch: 9.1 sequences, near the gradient noise scale about 9.1 sequences (5.8 to 15): about as large as is "
        "efficient"
    )
    assert advise(within).sentences[0] == (
        "The batch of 9.1 sequences is near the gradient noise scale, about 9.1 sequences (5.8 to 15): about 2× the "
        "minimum number of samples and 2× the minimum number of updates, a common trade-off."
    )
    unbounded = replace(found(4.5, low=4.0, high=math.inf), batch=16.0)
    assert "16 sequences, near the gradient noise scale about 4.5 sequences (at least 4)" in str(one_line(unbounded))


def test_interval_from_far_below_to_far_above_the_batch_is_no_answer() -> None:
    wide = replace(found(17.0, low=0.0, high=2940.0), batch=56.0)
    assert classify(wide) == "unknown"
    assert one_line(wide) is None
    first = advise(wide).sentences[0]
    assert first.endswith(
        "the gradient noise scale is between 0 and 2,940 sequences, too uncertain to compare with the batch of 56. "
        "More updates narrow the estimate."
    )
    assert classify(replace(wide, high=200.0)) == "near"
    assert classify(replace(wide, low=14.0)) == "near"


def test_scale_that_cannot_be_measured_gives_no_advice() -> None:
    assert classify(found(math.inf)) == "unknown"
    assert one_line(found(None)) is None
