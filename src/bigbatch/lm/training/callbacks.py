"""Training callbacks, the metrics row of an update, and the result of a run."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from bigbatch.scaling.noise_scale import NoiseScale
from bigbatch.window_report import WindowReport

MetricsRow = dict[str, Any]


class TrainerCallback(Protocol):
    """Receiver of the events of a run, as they happen."""

    def on_update(self, row: MetricsRow) -> None:
        """Handle one update; ``row`` is its row of metrics.jsonl, without a validation loss."""

    def on_validation(self, step: int, loss: float) -> None:
        """Handle a validation; ``loss`` is the mean in nats per token."""

    def on_sample(self, step: int, text: str) -> None:
        """Handle a text that the model generated."""


@dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
        step: Updates done, the skipped ones included.
        skipped: Updates that changed nothing: without items, or with gradients that are not finite.
        finished: Whether all updates are done; False if the run was stopped.
        validation_loss: The last one, in nats per token, or None.
        elapsed_s: Seconds of the whole loop.
    """

    step: int
    skipped: int
    finished: bool
    validation_loss: float | None
    elapsed_s: float


def metrics_row(step: int, report: WindowReport, *, lr: float, clock: bool = True) -> MetricsRow:
    """Return the row of metrics.jsonl for one update; without ``clock``, values that depend on timing are None.

    All values are global: loss, items, tokens per second, micro-batches, and the highest peak of any rank.
    """
    tokens = report.tokens or 0
    retries = {"retries": report.retries} if report.retries else {}
    row = {
        "step": step,
        "loss": report.loss,
        "items": int(report.items) if report.items == int(report.items) else report.items,  # weights of messages
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
    """Return the noise scale in items and in sequences; infinite bounds become null in the file."""
    if noise is None:
        return {"noise_scale_items": None}
    per_sequence = noise.items_per_sample or math.nan
    return {
        "noise_scale_items": noise.scale_items,
        "noise_scale_sequences": noise.scale_items / per_sequence,
        "noise_low_sequences": noise.low_items / per_sequence,
        "noise_high_sequences": noise.high_items / per_sequence,
    }
