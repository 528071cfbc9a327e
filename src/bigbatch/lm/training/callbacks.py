"""Training callbacks, the metrics row of an update, and the result of a run."""

import math
from collections.abc import Mapping
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
        """Handle a validation; ``loss`` is the mean in nats per token, of several sets that of ``best_metric``."""

    def on_evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Handle the losses of named validation sets, in nats per token; called before `on_validation`."""

    def on_validation_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Handle the metrics of a validation of pairs, such as ``accuracy``; called before `on_validation`."""

    def on_sample(self, step: int, text: str) -> None:
        """Handle a text that the model generated."""


@dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
        step: Updates done, the skipped ones included.
        skipped: Updates that changed nothing: without items, or with gradients that are not finite.
        finished: Whether the run has ended, early or after all updates; False if it was stopped.
        validation_loss: The last one, in nats per token, or None.
        elapsed_s: Seconds of the whole loop.
        stopped_early: Whether ``early_stopping`` has ended it.
        saved_step: Number of updates behind the saved model.
        best_step: Number of updates done at the best validation; 0 without one.
        best_loss: The lowest validation loss, in nats per token, or None.
    """

    step: int
    skipped: int
    finished: bool
    validation_loss: float | None
    elapsed_s: float
    stopped_early: bool = False
    saved_step: int = 0
    best_step: int = 0
    best_loss: float | None = None


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


def perplexity(loss: float) -> float:
    """Return the perplexity of a loss in nats per token; infinite where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


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
