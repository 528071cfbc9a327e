"""Export of metrics to dashboards: TensorBoard, Weights & Biases, MLflow or trackio.

updates, validations → finite numbers by tag → the writer of each dashboard
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bigbatch.errors import InputError
from bigbatch.lm.training.callbacks import MetricsRow, TrainerCallback, perplexity
from bigbatch.lm.training.dashboard_writers import WRITERS, Write

TAGS = {
    "loss": "train/loss",
    "router_aux_loss": "train/router_aux_loss",
    "accuracy": "train/accuracy",
    "margin": "train/margin",
    "chosen_reward": "train/chosen_reward",
    "rejected_reward": "train/rejected_reward",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "items": "batch/items",
    "tokens": "batch/tokens",
    "num_microbatches": "batch/num_microbatches",
    "noise_scale_items": "batch/noise_scale_items",
    "noise_scale_sequences": "batch/noise_scale_sequences",
    "noise_low_sequences": "batch/noise_low_sequences",
    "noise_high_sequences": "batch/noise_high_sequences",
    "sequences": "batch/sequences",
    "global_batch": "batch/global_batch",
    "tokens_per_s": "cost/tokens_per_s",
    "elapsed_s": "cost/elapsed_s",
    "peak_bytes": "cost/peak_bytes",
    "slowest_share": "cost/slowest_share",
    "slowest_rank": "cost/slowest_rank",
    "ranks": "cost/ranks",
    "retries": "cost/retries",
}
"""Tags of the fields of metrics.jsonl; those of other numbers are ``more/FIELD``."""

# fields that are no plain number, or exported in another way
_OWN_TAGS = ("step", "skipped", "validation_loss", "validation_perplexity")


def check_log(log: Sequence[str]) -> None:
    """Check that the packages of the dashboards are installed.

    Raises:
        InputError: One is not installed.
    """
    for name in log:
        if name == "none":
            continue
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, such as the one that wandb makes
            raise InputError(f"--log {name} needs {name}, which is not installed: pip install {name}.")


class DashboardCallback:
    """Callback that writes updates and validations to a dashboard.

    Args:
        write: Writes numbers by tag.
        has_perplexity: Whether the validation loss is that of tokens.
    """

    def __init__(self, write: Write, *, has_perplexity: bool = True) -> None:
        self._write = write
        self._has_perplexity = has_perplexity

    def on_update(self, row: MetricsRow) -> None:
        """Write the finite numbers of an update."""
        numbers = {
            TAGS.get(name, f"more/{name}"): float(value)
            for name, value in row.items()
            if isinstance(value, int | float) and name not in _OWN_TAGS
        }
        numbers["train/skipped"] = float(bool(row["skipped"]))
        self._write(row["step"], {tag: value for tag, value in numbers.items() if math.isfinite(value)})

    def on_validation(self, step: int, loss: float) -> None:
        """Write a validation loss."""
        self._write_losses(step, {"": loss})

    def on_evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Write the losses of named sets."""
        self._write_losses(step, {f"/{name}": loss for name, loss in losses.items()})

    def on_validation_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a validation of pairs."""
        values = {f"validation/{name}": value for name, value in metrics.items() if math.isfinite(value)}
        if values:
            self._write(step, values)

    def _write_losses(self, step: int, losses: Mapping[str, float]) -> None:
        values = {f"validation/loss{ending}": loss for ending, loss in losses.items()}
        if self._has_perplexity:
            values |= {f"validation/perplexity{ending}": perplexity(loss) for ending, loss in losses.items()}
        if finite := {tag: value for tag, value in values.items() if math.isfinite(value)}:
            self._write(step, finite)

    def on_sample(self, step: int, text: str) -> None:
        """Ignore generated text."""


class CallbackList:
    """Callback that calls several callbacks in order."""

    def __init__(self, *callbacks: TrainerCallback) -> None:
        self._callbacks = callbacks

    def on_update(self, row: MetricsRow) -> None:
        """Forward an update."""
        for callback in self._callbacks:
            callback.on_update(row)

    def on_validation(self, step: int, loss: float) -> None:
        """Forward a validation."""
        for callback in self._callbacks:
            callback.on_validation(step, loss)

    def on_evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Forward the losses of named sets."""
        for callback in self._callbacks:
            callback.on_evaluation(step, losses)

    def on_validation_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Forward the metrics of a validation of pairs."""
        for callback in self._callbacks:
            callback.on_validation_metrics(step, metrics)

    def on_sample(self, step: int, text: str) -> None:
        """Forward a generated text."""
        for callback in self._callbacks:
            callback.on_sample(step, text)


@contextmanager
def with_dashboards(
    callback: TrainerCallback,
    log: Sequence[str],
    folder: Path,
    *,
    done: int,
    settings: Mapping[str, Any],
    has_perplexity: bool,
) -> Iterator[TrainerCallback]:
    """Yield a callback that also writes to dashboards; under ``("none",)``, the callback itself.

    Args:
        callback: The callback of the run.
        log: ``none``, or some of ``tensorboard``, ``wandb``, ``mlflow`` and ``trackio``.
        folder: The run directory.
        done: Updates of earlier processes; later points are deleted if the dashboard supports that.
        settings: Settings of the run, for dashboards that show them.
        has_perplexity: Whether the validation loss is the cross entropy of tokens.

    Raises:
        BigbatchError: The files of a dashboard cannot be written, or its server cannot be reached.
    """
    names = [name for name in log if name != "none"]
    if not names:
        yield callback
        return
    with ExitStack() as stack:
        writers = [stack.enter_context(WRITERS[name](folder, done, settings)) for name in names]
        yield CallbackList(callback, *(DashboardCallback(write, has_perplexity=has_perplexity) for write in writers))
