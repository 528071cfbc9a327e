"""Export of metrics to a dashboard: TensorBoard or trackio.

updates, validations → finite numbers by tag → the writer of a dashboard
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bigbatch.errors import BigbatchError, InputError, os_reason
from bigbatch.lm.runs.file_names import TENSORBOARD
from bigbatch.lm.training.callbacks import MetricsRow, TrainerCallback

TAGS = {
    "loss": "train/loss",
    "router_aux_loss": "train/router_aux_loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "items": "batch/items",
    "tokens": "batch/tokens",
    "num_microbatches": "batch/num_microbatches",
    "noise_scale_items": "batch/noise_scale_items",
    "global_batch": "batch/global_batch",
    "tokens_per_s": "cost/tokens_per_s",
    "elapsed_s": "cost/elapsed_s",
    "peak_bytes": "cost/peak_bytes",
    "slowest_share": "cost/slowest_share",
}
"""Fields of metrics.jsonl that are exported, with their tags."""

Write = Callable[[int, Mapping[str, float]], None]


def check_log(log: str) -> None:
    """Check that the package of a dashboard is installed.

    Raises:
        InputError: It is not installed.
    """
    if log != "none" and find_spec(log) is None:
        raise InputError(f"--log {log} needs {log}, which is not installed: pip install {log}.")


class DashboardCallback:
    """Callback that writes updates and validations to a dashboard."""

    def __init__(self, write: Write) -> None:
        self._write = write

    def on_update(self, row: MetricsRow) -> None:
        """Write the finite numbers of an update."""
        values = {tag: float(row[name]) for name, tag in TAGS.items() if isinstance(row.get(name), int | float)}
        self._write(row["step"], {tag: value for tag, value in values.items() if math.isfinite(value)})

    def on_validation(self, step: int, loss: float) -> None:
        """Write a validation loss."""
        if math.isfinite(loss):
            self._write(step, {"validation/loss": loss})

    def on_evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Write the losses of named sets."""
        values = {f"validation/loss/{name}": loss for name, loss in losses.items() if math.isfinite(loss)}
        self._write(step, values)

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

    def on_sample(self, step: int, text: str) -> None:
        """Forward a generated text."""
        for callback in self._callbacks:
            callback.on_sample(step, text)


@contextmanager
def with_dashboard(
    callback: TrainerCallback, log: str, folder: Path, *, done: int, settings: Mapping[str, Any]
) -> Iterator[TrainerCallback]:
    """Yield a callback that also writes to a dashboard; under ``"none"``, the callback itself.

    Args:
        callback: The callback of the run.
        log: ``none``, ``tensorboard`` or ``trackio``.
        folder: The run directory.
        done: Updates of earlier processes; later points are deleted if the dashboard supports that.
        settings: Settings of the run, for dashboards that show them.

    Raises:
        BigbatchError: The dashboard's files cannot be written.
    """
    if log == "none":
        yield callback
        return
    opened = _tensorboard(folder, done) if log == "tensorboard" else _trackio(folder, done, settings)
    with opened as write:
        yield CallbackList(callback, DashboardCallback(write))


@contextmanager
def _tensorboard(folder: Path, done: int) -> Iterator[Write]:
    from torch.utils.tensorboard import SummaryWriter

    place = folder / TENSORBOARD
    if place.is_symlink():
        raise BigbatchError(f"{place} is a link, and links in a run directory are not followed. Remove it.")
    with _write_errors(place):
        writer = SummaryWriter(str(place), purge_step=done + 1 if done else None, flush_secs=10)

    def write(step: int, values: Mapping[str, float]) -> None:
        with _write_errors(place):
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)

    try:
        yield write
    finally:
        with _write_errors(place):
            writer.close()


@contextmanager
def _trackio(folder: Path, done: int, settings: Mapping[str, Any]) -> Iterator[Write]:
    import trackio

    run = trackio.init(
        project="bigbatch", name=folder.name, config=dict(settings), resume="allow" if done else "never", embed=False
    )
    try:
        yield lambda step, values: run.log(dict(values), step=step)
    finally:
        run.finish()


@contextmanager
def _write_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BigbatchError(f"{place} cannot be written: {os_reason(error)}.") from error
