"""The figures of a run for dashboards beside its own: TensorBoard or trackio, where they are installed.

updates, validations → finite numbers by tag → the writer of a dashboard
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bigbatch.errors import BigbatchError, InputError
from bigbatch.lm.files import os_reason
from bigbatch.lm.runs.file_names import TENSORBOARD
from bigbatch.lm.training.callbacks import MetricsRow, TrainerCallback

TAGS = {
    "loss": "train/loss",
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
"""What of a line of metrics.jsonl is written, and under which tag."""

Write = Callable[[int, Mapping[str, float]], None]


def check_log(log: str) -> None:
    """Refuse a dashboard whose package is not installed.

    Raises:
        InputError: It is not; the message says how to install it.
    """
    if log != "none" and find_spec(log) is None:
        raise InputError(f"--log {log} needs {log}, which is not installed: pip install {log}.")


class DashboardCallback:
    """Hand the figures of updates and validations to a dashboard."""

    def __init__(self, write: Write) -> None:
        self._write = write

    def on_update(self, row: MetricsRow) -> None:
        """Write what of an update is a finite number."""
        values = {tag: float(row[name]) for name, tag in TAGS.items() if isinstance(row.get(name), int | float)}
        self._write(row["step"], {tag: value for tag, value in values.items() if math.isfinite(value)})

    def on_validation(self, step: int, loss: float) -> None:
        """Write a validation loss."""
        if math.isfinite(loss):
            self._write(step, {"validation/loss": loss})

    def on_sample(self, step: int, text: str) -> None:
        """Leave out what the model writes."""


class CallbackList:
    """Tell several listeners the same, in order."""

    def __init__(self, *listeners: TrainerCallback) -> None:
        self._listeners = listeners

    def on_update(self, row: MetricsRow) -> None:
        """Tell of an update."""
        for callback in self._listeners:
            callback.on_update(row)

    def on_validation(self, step: int, loss: float) -> None:
        """Tell of a validation."""
        for callback in self._listeners:
            callback.on_validation(step, loss)

    def on_sample(self, step: int, text: str) -> None:
        """Tell what the model writes."""
        for callback in self._listeners:
            callback.on_sample(step, text)


@contextmanager
def with_dashboard(
    callback: TrainerCallback, log: str, folder: Path, *, done: int, settings: Mapping[str, Any]
) -> Iterator[TrainerCallback]:
    """Let a dashboard hear what a listener hears; the listener alone under ``"none"``.

    Args:
        callback: Whom the run tells anyway.
        log: ``none``, ``tensorboard`` or ``trackio``.
        folder: The run directory.
        done: Updates that earlier processes made; what they wrote beyond is taken back where the dashboard can.
        settings: Of the run, for dashboards that show them.

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
    with _close_message(place):
        writer = SummaryWriter(str(place), purge_step=done + 1 if done else None, flush_secs=10)

    def write(step: int, values: Mapping[str, float]) -> None:
        with _close_message(place):
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)

    try:
        yield write
    finally:
        with _close_message(place):
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
def _close_message(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BigbatchError(f"{place} cannot be written: {os_reason(error)}.") from error
