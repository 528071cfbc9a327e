"""Dashboards beside metrics.jsonl: what they hear, and what is said where they are not installed."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bigbatch.cli import main
from bigbatch.cli.commands import resume, train
from bigbatch.cli.options import ResumeOptions
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.training import dashboards
from bigbatch.lm.training.dashboards import CallbackList, DashboardCallback
from support.language_models import RecordingCallback, metrics, records, save_model_folder, write_jsonl
from support.run_directories import rows

needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
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
    row = rows(1)[0] | {"grad_norm": math.nan, "loss": None, "peak_bytes": 5, "noise_scale_items": 7.0}
    listener.on_update(row)
    listener.on_validation(1, 2.5)
    listener.on_validation(2, math.inf)
    listener.on_evaluation(3, {"web": 1.5, "code": math.nan})
    listener.on_sample(2, "text")
    (step, values), validation, evaluation = written
    assert step == 1
    assert "train/loss" not in values
    assert "train/grad_norm" not in values
    assert (values["cost/peak_bytes"], values["batch/noise_scale_items"]) == (5.0, 7.0)
    assert validation == (1, {"validation/loss": 2.5})
    assert evaluation == (3, {"validation/loss/web": 1.5})


def test_every_callback_receives_all_events() -> None:
    one, other = RecordingCallback(), RecordingCallback()
    both = CallbackList(one, other)
    both.on_update({"step": 1})
    both.on_validation(1, 2.0)
    both.on_evaluation(1, {"web": 2.0})
    both.on_sample(1, "text")
    assert (
        vars(one)
        == vars(other)
        == {
            "rows": [{"step": 1}],
            "validations": [(1, 2.0)],
            "evaluations": [(1, {"web": 2.0})],
            "samples": [(1, "text")],
        }
    )


@pytest.mark.parametrize("log", ["tensorboard", "trackio"])
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


@needs_trackio
def test_trackio_receives_run(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is loaded, which is now
    from trackio.sqlite_storage import SQLiteStorage

    assert train.run(TrainConfig(log="trackio", **settings)) == 0
    logged = SQLiteStorage.get_logs("bigbatch", "run")
    assert [row["train/loss"] for row in logged if "train/loss" in row] == pytest.approx(
        [row["loss"] for row in metrics(settings["out"])]
    )
