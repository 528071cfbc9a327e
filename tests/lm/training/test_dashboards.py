"""Dashboards compared with metrics.jsonl: what they receive, and the error where they are not installed."""

import json
import math
import struct
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bigbatch import lm
from bigbatch.cli import main
from bigbatch.cli.commands import resume, train
from bigbatch.cli.options import ResumeOptions
from bigbatch.errors import BigbatchError, InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.identity import read_identity
from bigbatch.lm.training import dashboards
from bigbatch.lm.training.dashboards import TAGS, CallbackList, DashboardCallback, check_log
from support.language_models import RecordingCallback, metrics, records, save_model_folder, write_jsonl
from support.run_directories import rows

needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
needs_mlflow = pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow-skinny is not installed")
needs_trackio = pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    data = write_jsonl(tmp_path / "data.jsonl", records(40))
    model = save_model_folder(tmp_path / "base")
    return {
        "data": str(data), "model": str(model), "device": "cpu", "global_batch": 8, "microbatch": 3, "steps": 4,
        "lr": 1e-2, "max_length": 32, "checkpoint_every": 2, "validation_every": 2, "out": tmp_path / "run",
    }  # fmt: skip


def test_finite_numbers_are_written_under_their_tags() -> None:
    written: list[tuple[int, dict[str, float]]] = []
    listener = DashboardCallback(lambda step, values: written.append((step, dict(values))))
    row = rows(1)[0] | {"grad_norm": math.nan, "loss": None, "peak_bytes": 5, "noise_scale_items": 7.0, "new_field": 3}
    listener.on_update(row)
    listener.on_validation(1, 2.5)
    listener.on_validation(2, math.inf)
    listener.on_evaluation(3, {"web": 1.5, "code": math.nan})
    listener.on_validation_metrics(4, {"accuracy": 0.75, "margin": math.inf})
    listener.on_sample(2, "text")
    (step, values), validation, evaluation, of_pairs = written
    assert step == 1
    assert "train/loss" not in values
    assert "train/grad_norm" not in values
    assert values["train/skipped"] == 0.0
    assert values["more/new_field"] == 3.0
    assert (values["cost/peak_bytes"], values["batch/noise_scale_items"]) == (5.0, 7.0)
    assert validation == (1, {"validation/loss": 2.5, "validation/perplexity": math.exp(2.5)})
    assert evaluation == (3, {"validation/loss/web": 1.5, "validation/perplexity/web": math.exp(1.5)})
    assert of_pairs == (4, {"validation/accuracy": 0.75})


def test_every_callback_receives_all_events() -> None:
    one, other = RecordingCallback(), RecordingCallback()
    both = CallbackList(one, other)
    both.on_update({"step": 1})
    both.on_validation(1, 2.0)
    both.on_evaluation(1, {"web": 2.0})
    both.on_validation_metrics(1, {"accuracy": 1.0})
    both.on_sample(1, "text")
    assert (
        vars(one)
        == vars(other)
        == {
            "rows": [{"step": 1}],
            "validations": [(1, 2.0)],
            "evaluations": [(1, {"web": 2.0})],
            "validation_metrics": [(1, {"accuracy": 1.0})],
            "samples": [(1, "text")],
        }
    )


@pytest.mark.parametrize("log", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_missing_dashboard_is_one_sentence_and_writes_nothing(
    log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dashboards, "find_spec", lambda name: None)
    assert main(["train", "--log", log, "--out", str(tmp_path / "run")]) == 2
    printed, complained = capfd.readouterr()
    assert printed == ""
    assert complained == f"bigbatch train: --log {log} needs {log}, which is not installed: pip install {log}.\n"
    assert list(tmp_path.iterdir()) == []


@needs_tensorboard
def test_tensorboard_has_every_update_once_after_resume(settings: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = settings["out"]
    assert train.run(TrainConfig(log="tensorboard", **settings | {"steps": 4})) == 0
    (run / "model").rename(run / "gone")
    for name in ("step-4",):
        (run / "checkpoints" / name).rename(run / "checkpoints" / "passed-over")
    assert resume.run(TrainConfig(), ResumeOptions(run=run)) == 0
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    assert [value for _, value in losses] == pytest.approx([row["loss"] for row in metrics(run)])
    assert [event.step for event in found.Scalars("validation/loss")] == [2, 4]


def test_folder_of_the_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    if (spec := find_spec("trackio")) is None or spec.origin is not None:
        pytest.skip("trackio is installed")
    with pytest.raises(InputError, match="needs trackio, which is not installed"):
        check_log(["trackio"])


def interrupted(settings: dict[str, Any], log: str | list[str]) -> list[dict[str, Any]]:
    """Train for three updates, resume from the checkpoint of the second; return the rows of metrics.jsonl."""
    run = settings["out"]

    class Die(lm.Callback):
        def on_update(self, row: dict[str, Any]) -> None:
            if row["step"] == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lm.train({**settings, "log": log}, callbacks=[Die()])
    if "wandb" in log:
        time.sleep(1)  # wandb 0.22 names the folder of an offline run by the second, and writes both into one file
    assert resume.run(TrainConfig(), ResumeOptions(run=run)) == 0
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    return rows


def expected_values(row: dict[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
    assert numbers.keys() - TAGS.keys() <= {"step", "validation_loss", "validation_perplexity"}
    return {TAGS[name]: value for name, value in numbers.items() if name in TAGS}


@pytest.mark.slow
@needs_wandb
def test_wandb_has_what_metrics_have_after_resume(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows = interrupted(settings, "wandb")
    files = sorted(settings["out"].glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    end_s = time.monotonic() + 60
    while any(wandb_records(path)[0] is None for path in files) and time.monotonic() < end_s:
        time.sleep(0.1)  # a process of its own writes them
    runs = [wandb_records(path) for path in files]
    assert {found.run_id for found, _ in runs} == {read_identity(settings["out"]).run_id}
    assert {found.project for found, _ in runs} == {"bigbatch"}
    assert list(runs[0][1]) == [1, 2, 3]
    assert list(runs[1][1]) == [3, 4]
    logged = runs[0][1] | runs[1][1]  # as wandb sync merges them
    for row in rows:
        assert logged[row["step"]].items() >= expected_values(row).items()
    for kind in ("loss", "perplexity"):
        tag, name = f"validation/{kind}", f"validation_{kind}"
        found = {step: values[tag] for step, values in logged.items() if tag in values}
        assert found == {row["step"]: row[name] for row in rows if name in row}


@needs_mlflow
def test_mlflow_has_what_metrics_have_after_resume(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no database
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    settings["deterministic"] = True  # without times, which differ when an update is repeated
    rows = interrupted(settings, "mlflow")
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("bigbatch").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["global_batch"] == "8"
    for name, tag in TAGS.items():
        points = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, tag)]
        assert sorted(points) == [(row["step"], row[name]) for row in rows if row.get(name) is not None], name
    points = [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, "validation/loss")]
    assert points == [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]


@pytest.fixture
def mlflow_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a client of a store in files, which mlflow-skinny has."""
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    return MlflowClient()


def mlflow_points(client: Any, tag: str) -> list[tuple[int, float]]:
    """Return the points of the only run."""
    (run,) = client.search_runs([client.get_experiment_by_name("bigbatch").experiment_id])
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, tag)]


@needs_wandb
@needs_mlflow
def test_several_dashboards_receive_the_same(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, mlflow_client: Any
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert train.run(TrainConfig(log=["wandb", "mlflow"], **settings)) == 0
    assert json.loads((settings["out"] / "config.json").read_text())["log"] == ["wandb", "mlflow"]
    expected = [(row["step"], row["loss"]) for row in metrics(settings["out"])]
    assert len(expected) == 4
    assert mlflow_points(mlflow_client, "train/loss") == expected
    (path,) = settings["out"].glob("wandb/offline-run-*/*.wandb")
    end_s = time.monotonic() + 60
    while len(wandb_records(path)[1]) < 4 and time.monotonic() < end_s:
        time.sleep(0.1)  # a process of its own writes them
    assert [(step, values["train/loss"]) for step, values in wandb_records(path)[1].items()] == expected


@needs_mlflow
def test_validation_accuracy_of_pairs_is_logged(settings: dict[str, Any], tmp_path: Path, mlflow_client: Any) -> None:
    pairs = [{"prompt": f"{i} plus {i}", "chosen": f"is {2 * i}", "rejected": "is odd"} for i in range(16)]
    data = str(write_jsonl(tmp_path / "pairs.jsonl", pairs))
    seen: list[tuple[int, dict[str, float]]] = []

    class Keep(lm.Callback):
        def on_validation_metrics(self, step: int, metrics: Any) -> None:
            seen.append((step, metrics))

    lm.train(
        {**settings, "data": data, "objective": "dpo", "log": "mlflow", "validation_fraction": 0.25}, callbacks=[Keep()]
    )
    rows = metrics(settings["out"])
    for name in ("accuracy", "margin", "chosen_reward", "rejected_reward"):
        expected = [(row["step"], row[f"validation_{name}"]) for row in rows if "validation_loss" in row]
        assert [step for step, _ in expected] == [2, 4]
        assert mlflow_points(mlflow_client, f"validation/{name}") == expected
        assert [(step, values[name]) for step, values in seen] == expected
        assert mlflow_points(mlflow_client, f"train/{name}") == [(row["step"], row[name]) for row in rows]
    assert mlflow_points(mlflow_client, "validation/perplexity") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--log", "wandb", "wandb"], "--log is a list: name each dashboard once."),
        (["--log", "wandb", "--log", "none"], "--log is a list: none excludes the others."),
        (["--log", "wandb", "neptune"], "--log contains 'neptune': it must be none, tensorboard, wandb, mlflow or "
         "trackio."),
    ],
)  # fmt: skip
def test_unusable_dashboards_are_refused(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words]) == 2
    assert capfd.readouterr().err == f"bigbatch train: {message}\n"


def test_run_after_several_dashboards_is_missing(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", "--log", "none", "runs/x"]) == 2
    assert capfd.readouterr().err == (
        "bigbatch resume: RUN is missing: pass the directory of a run, such as runs/tiny-python-stdlib, before --log, "
        "which accepts every value after it.\n"
    )


@needs_mlflow
def test_unreachable_mlflow_is_one_sentence(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://host")
    with pytest.raises(BigbatchError, match=r"^--log mlflow failed: .*\. Resume the run; --log none continues it"):
        train.run(TrainConfig(log="mlflow", **settings))


def wandb_records(path: Path) -> tuple[Any, dict[int, dict[str, float]]]:
    """Return the run and the rows of an offline file: protobuf in blocks of 32 KiB, in the format of LevelDB's logs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, run, rows = path.read_bytes(), 7, b"", None, {}
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind not in (1, 4):  # whole, or the last part
            continue
        record, parts = Record.FromString(parts), b""
        if record.WhichOneof("record_type") == "run":
            run = record.run
        elif record.WhichOneof("record_type") == "history":
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            rows[values["_step"]] = values
    return run, rows


@needs_trackio
def test_trackio_receives_run(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is loaded, which is now
    from trackio.sqlite_storage import SQLiteStorage

    assert train.run(TrainConfig(log="trackio", **settings)) == 0
    logged = SQLiteStorage.get_logs("bigbatch", "run")
    assert [row["train/loss"] for row in logged if "train/loss" in row] == pytest.approx(
        [row["loss"] for row in metrics(settings["out"])]
    )
