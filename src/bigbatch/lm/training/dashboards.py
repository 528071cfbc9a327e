"""Export of metrics to a dashboard: TensorBoard, Weights & Biases, MLflow or trackio.

updates, validations → finite numbers by tag → the writer of a dashboard
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bigbatch.errors import BigbatchError, InputError, first_line, os_reason
from bigbatch.lm.runs.file_names import TENSORBOARD
from bigbatch.lm.runs.identity import read_identity
from bigbatch.lm.training.callbacks import MetricsRow, TrainerCallback, perplexity

TAGS = {
    "loss": "train/loss",
    "router_aux_loss": "train/router_aux_loss",
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

PROJECT = "bigbatch"
"""Name of the project or experiment in which runs are."""

# fields that are no plain number, or exported in another way
_OWN_TAGS = ("step", "skipped", "validation_loss", "validation_perplexity")

_MLFLOW_TAG = "bigbatch.run_id"
_MLFLOW_LONGEST = 500  # characters of a setting

Write = Callable[[int, Mapping[str, float]], None]


def check_log(log: str) -> None:
    """Check that the package of a dashboard is installed.

    Raises:
        InputError: It is not installed.
    """
    if log == "none":
        return
    spec = find_spec(log)
    if spec is None or spec.origin is None:  # a folder of that name, such as the one that wandb makes
        raise InputError(f"--log {log} needs {log}, which is not installed: pip install {log}.")


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
        log: ``none``, ``tensorboard``, ``wandb``, ``mlflow`` or ``trackio``.
        folder: The run directory.
        done: Updates of earlier processes; later points are deleted if the dashboard supports that.
        settings: Settings of the run, for dashboards that show them.

    Raises:
        BigbatchError: The dashboard's files cannot be written, or its server cannot be reached.
    """
    if log == "none":
        yield callback
        return
    if log == "tensorboard":
        opened = _tensorboard(folder, done)
    else:
        opened = {"wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}[log](folder, done, settings)
    with opened as write:
        has_perplexity = settings.get("objective", "sft") == "sft"
        yield CallbackList(callback, DashboardCallback(write, has_perplexity=has_perplexity))


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
def _wandb(folder: Path, done: int, settings: Mapping[str, Any]) -> Iterator[Write]:
    """Log to Weights & Biases, in the mode that is configured there; the run id is that of the run directory."""
    import wandb

    with _service_errors("wandb"):
        run = wandb.init(
            project=PROJECT,
            name=folder.name,
            id=read_identity(folder).run_id,
            resume="allow" if done else None,
            config=dict(settings),
            dir=str(folder),
            settings=wandb.Settings(console="off"),
        )

    def write(step: int, values: Mapping[str, float]) -> None:
        with _service_errors("wandb"):
            run.log(dict(values), step=step)

    try:
        yield write
    finally:
        with _service_errors("wandb"):
            run.finish()


@contextmanager
def _mlflow(folder: Path, done: int, settings: Mapping[str, Any]) -> Iterator[Write]:
    """Log to MLflow, where it is configured to; a resumed run is found by the id of the run directory, its tag.

    A point that MLflow has already, of an update that is repeated after a crash, is not logged a second time.
    """
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    with _service_errors("mlflow"):
        client = MlflowClient()
        run_id, is_new = _mlflow_run(client, folder)
        if is_new:
            for name, value in settings.items():
                client.log_param(run_id, name, str(value)[:_MLFLOW_LONGEST])
        client.update_run(run_id, status="RUNNING")
    known: dict[str, set[tuple[int, float]]] = {}

    def is_known(tag: str, step: int, value: float) -> bool:
        if tag not in known:
            history = [] if is_new else client.get_metric_history(run_id, tag)
            known[tag] = {(point.step, point.value) for point in history}
        return (step, value) in known[tag]

    def write(step: int, values: Mapping[str, float]) -> None:
        with _service_errors("mlflow"):
            now_ms = int(time.time() * 1000)
            points = [Metric(tag, value, now_ms, step) for tag, value in values.items()]
            points = [point for point in points if not is_known(point.key, step, point.value)]
            if points:
                client.log_batch(run_id, metrics=points)

    status = "FAILED"
    try:
        yield write
        status = "FINISHED"
    finally:
        with _service_errors("mlflow"):
            client.set_terminated(run_id, status)


def _mlflow_run(client: Any, folder: Path) -> tuple[str, bool]:
    """Return the id of the run in MLflow, and whether it was created now."""
    experiment = client.get_experiment_by_name(PROJECT)
    experiment_id = client.create_experiment(PROJECT) if experiment is None else experiment.experiment_id
    own_id = read_identity(folder).run_id
    found = client.search_runs([experiment_id], filter_string=f"tags.`{_MLFLOW_TAG}` = '{own_id}'")
    if found:
        return str(found[0].info.run_id), False
    run = client.create_run(experiment_id, run_name=folder.name, tags={_MLFLOW_TAG: own_id})
    return str(run.info.run_id), True


@contextmanager
def _trackio(folder: Path, done: int, settings: Mapping[str, Any]) -> Iterator[Write]:
    import trackio

    run = trackio.init(
        project=PROJECT, name=folder.name, config=dict(settings), resume="allow" if done else "never", embed=False
    )
    try:
        yield lambda step, values: run.log(dict(values), step=step)
    finally:
        run.finish()


@contextmanager
def _service_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (BigbatchError, AssertionError):
        raise
    except Exception as error:
        raise BigbatchError(
            f"--log {name} failed: {first_line(error)}. Resume the run; --log none continues it without {name}."
        ) from error


@contextmanager
def _write_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BigbatchError(f"{place} cannot be written: {os_reason(error)}.") from error
