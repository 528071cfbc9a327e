"""Writers of the dashboards: each opens a run of the dashboard, and writes numbers by tag to it.

run directory, updates done before → ``write(step, {tag: number})`` → closed at the end of the run
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from bigbatch.errors import BigbatchError, first_line, os_reason
from bigbatch.lm.runs.file_names import TENSORBOARD
from bigbatch.lm.runs.identity import read_identity

PROJECT = "bigbatch"
"""Name of the project or experiment in which runs are."""

_MLFLOW_TAG = "bigbatch.run_id"
_MLFLOW_LONGEST = 500  # characters of a setting

Write = Callable[[int, Mapping[str, float]], None]
Open = Callable[[Path, int, Mapping[str, Any]], AbstractContextManager[Write]]


@contextmanager
def _tensorboard(folder: Path, done: int, settings: Mapping[str, Any]) -> Iterator[Write]:
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


WRITERS: Mapping[str, Open] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
"""By the name of the dashboard; called with the run directory, the updates done before and the settings."""
