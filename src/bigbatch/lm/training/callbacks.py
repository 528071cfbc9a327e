"""What a run tells: whom, when, the line of each update, and how it ended."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from bigbatch.scaling.noise_scale import NoiseScale
from bigbatch.window_report import WindowReport

MetricsRow = dict[str, Any]


class TrainerCallback(Protocol):
    """Whom a run tells what happens, when it happens."""

    def on_update(self, row: MetricsRow) -> None:
        """Hear of one update: what its line of metrics.jsonl will hold, without a validation loss."""

    def on_validation(self, step: int, loss: float) -> None:
        """Hear of a validation: the mean loss in nats per token."""

    def on_sample(self, step: int, text: str) -> None:
        """Hear what the model writes by now."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: Updates done, the skipped ones included: each had its batch.
        skipped: How many of them changed nothing, for want of items or of finite gradients.
        finished: Whether that is all; False if it was told to stop.
        validation_loss: The last one, in nats per token, or None.
        elapsed_s: Seconds of the whole loop.
    """

    step: int
    skipped: int
    finished: bool
    validation_loss: float | None
    elapsed_s: float


def metrics_row(step: int, report: WindowReport, *, lr: float, clock: bool = True) -> MetricsRow:
    """Make the line of metrics.jsonl for one update; without ``clock``, what differs from run to run is None.

    All of it is over all ranks: loss, items, tokens a second, micro-batches, and the peak of the rank that took most.
    """
    tokens = report.tokens or 0
    retries = {"retries": report.retries} if report.retries else {}
    row = {
        "step": step,
        "loss": report.loss,
        "items": int(report.items),
        "grad_norm": report.grad_norm,
        "lr": lr,
        "num_microbatches": report.num_microbatches,
        "tokens": tokens,
        "tokens_per_s": tokens / report.elapsed_s if clock else None,
        "peak_bytes": report.peak_bytes if clock else None,
        "elapsed_s": report.elapsed_s if clock else None,
        "skipped": report.skipped,
        **retries,
    }
    row |= _noise(report.noise)
    if (ranks := report.ranks) is not None:
        row["num_microbatches"] = sum(ranks.num_microbatches)
        row["ranks"] = ranks.size
        row["slowest_rank"] = ranks.slowest if clock else None
        row["slowest_share"] = ranks.slowest_share if clock else None
    return row


def _noise(noise: NoiseScale | None) -> MetricsRow:
    """Tell of the noise scale, in items and in sequences; infinite ends become null in the file."""
    if noise is None:
        return {"noise_scale_items": None}
    per_sequence = noise.items_per_sample or math.nan
    return {
        "noise_scale_items": noise.scale_items,
        "noise_scale_sequences": noise.scale_items / per_sequence,
        "noise_low_sequences": noise.low_items / per_sequence,
        "noise_high_sequences": noise.high_items / per_sequence,
    }
