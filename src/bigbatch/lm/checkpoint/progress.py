"""The progress of a run, as every checkpoint stores it: `bigbatch.lm.checkpoint.saved_state.SavedProgress`."""

from dataclasses import dataclass
from typing import Any

from bigbatch.lm.runs.directory import as_line


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        step: Number of updates done, including skipped ones.
        cursor: Number of samples used since the start of the first pass. With the seed, it determines the next samples.
        skipped: Number of skipped updates.
        skipped_in_a_row: Number of skipped updates since the last one that was applied.
        validation_loss: Last validation loss, in nats per token, or None.
        metrics_bytes: Size of metrics.jsonl.
        quarantine_bytes: Size of quarantine.jsonl.
        batch: Sequences in the last window according to the batch schedule; 0 without a schedule.
        pending_metrics_row: Last line of metrics.jsonl if the run was stopped before validating that update; it is
            written again with the validation loss. None otherwise.
        best_loss: Lowest finite validation loss so far, or None.
        best_step: Number of updates done at that validation; 0 without one.
        improved_loss: Validation loss of the last improvement, for early stopping, or None.
        validations_without_improvement: Number of validations since then.
    """

    step: int = 0
    cursor: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    validation_loss: float | None = None
    metrics_bytes: int = 0
    quarantine_bytes: int = 0
    batch: int = 0
    pending_metrics_row: dict[str, Any] | None = None
    best_loss: float | None = None
    best_step: int = 0
    improved_loss: float | None = None
    validations_without_improvement: int = 0

    @property
    def lines_before_pending(self) -> int:
        """Size of metrics.jsonl without the line that is written again."""
        return self.metrics_bytes - (0 if self.pending_metrics_row is None else len(as_line(self.pending_metrics_row)))
