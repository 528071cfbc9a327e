"""The predicted time of one update with offload: micro-batches as timed, and copies at the measured rate of the link.

chosen micro-batch, offloaded bytes, link → PredictedUpdate
"""

import math
from dataclasses import dataclass

from bigbatch.autotune.peak_prediction import PredictionError
from bigbatch.engine.engine import Engine
from bigbatch.engine.host_check import predicted_host_bytes
from bigbatch.lm.config.field_types import RECOMPUTED_LAYERS, CheckpointingMode
from bigbatch.offload.costs import BACKWARD_SHARE, link_bytes, streamed_s, sums_wait_s
from bigbatch.offload.link_rate import measure_link_rate


@dataclass(frozen=True)
class PredictedUpdate:
    """Seconds of one update; ``str(update)`` is a part of a line.

    Attributes:
        compute_s: Forward and backward.
        copies_s: Copies between host and device that these do not hide.
        link_rate: Measured, in bytes per second in each direction.
    """

    compute_s: float
    copies_s: float
    link_rate: float

    @property
    def total_s(self) -> float:
        """Seconds of the window and its update."""
        return self.compute_s + self.copies_s

    def __str__(self) -> str:
        return (
            f"about {self.total_s:.3g} s an update: {self.compute_s:.3g} s of forward and backward, "
            f"{self.copies_s:.3g} s of copies at {self.link_rate / 1e9:.3g} GB/s in each direction, measured"
        )


def predict_update(engine: Engine, tokens: float, checkpointing: CheckpointingMode) -> PredictedUpdate | None:
    """Predict an update of an engine in a single process, with the micro-batch that it has chosen.

    Measures the link, which takes about 0.1 s.

    Args:
        engine: With a choice in tokens.
        tokens: Of the window, on average.
        checkpointing: Of activations.

    Returns:
        None without offload, or if its bytes or the link are unknown.
    """
    choice = engine.choice
    assert choice is not None, "the micro-batch was chosen"
    try:
        link = link_bytes(*predicted_host_bytes(engine.accumulator))
    except PredictionError:
        return None
    if not link.to_card or (link_rate := measure_link_rate(engine.accumulator.device)) is None:
        return None
    num_microbatches, recomputed = math.ceil(tokens / choice.size), RECOMPUTED_LAYERS[checkpointing]
    microbatch_s = choice.timing.of(choice.size)  # the wait for sums included
    without_wait_s = (microbatch_s - link.per_microbatch / link_rate) / (1 - BACKWARD_SHARE)
    compute_s = tokens / choice.per_s * max(0.0, min(1.0, without_wait_s / microbatch_s))
    backward_s = compute_s / num_microbatches * (2 + recomputed) / (3 + recomputed)
    waiting_s = num_microbatches * sums_wait_s(link, link_rate, backward_s)
    return PredictedUpdate(compute_s, streamed_s(link, link_rate) + waiting_s, link_rate)
