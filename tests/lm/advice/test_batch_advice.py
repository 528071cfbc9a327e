"""Advice from extreme measurements of the noise scale."""

import math

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


def test_scale_that_cannot_be_measured_gives_no_advice() -> None:
    assert classify(found(math.inf)) == "unknown"
    assert one_line(found(None)) is None
