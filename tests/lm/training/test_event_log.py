"""events.jsonl: who began, went on and ended, through kills, half-written lines and places that cannot be written."""

import json
from pathlib import Path
from typing import Any

import pytest

from bigbatch.cli.commands import resume, train
from bigbatch.cli.options import ResumeOptions
from bigbatch.errors import BigbatchError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.report.run_reader import read_run
from bigbatch.lm.report.window_plan_chart import window_of
from bigbatch.lm.training import trainer
from support.language_models import metrics, records, save_model_folder, write_jsonl


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    data = write_jsonl(folder / "data.jsonl", records(40))
    model = save_model_folder(folder / "base")
    return {
        "data": str(data), "model": str(model), "device": "cpu", "global_batch": 8, "microbatch": 3, "steps": 4,
        "lr": 1e-2, "max_length": 32, "checkpoint_every": 2,
    }  # fmt: skip


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
    real = trainer.Trainer._update

    def failing(self: Any, step: int, *rest: Any) -> Any:
        if step == at:
            raise error
        return real(self, step, *rest)

    monkeypatch.setattr(trainer.Trainer, "_update", failing)


def test_run_logs_begin_and_finish(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert train.run(TrainConfig(out=tmp_path / "run", **settings)) == 0
    began, ended = events(tmp_path / "run")
    assert (began["event"], began["step"], began["total_steps"], began["settings"]) == ("begin", 0, 4, {})
    assert began["machine"] == "cpu, float32"
    assert began["chats"] is False
    # The allocator may return memory to the system between the start and the first update.
    assert 50 * 2**20 < began["process_bytes"] < 1.1 * metrics(tmp_path / "run")[0]["peak_bytes"]
    assert {"bigbatch", "torch", "transformers", "Python", "system"} <= began["versions"].keys()
    window = window_of(began["window"])
    assert window is not None
    assert (window.num_microbatches, window.num_samples, window.token_budget) == (3, 8, None)
    assert [len(lengths) for lengths in window.first] == [3, 3, 2]
    assert window.tokens == sum(map(sum, window.first)) <= window.laid_out_tokens
    assert (ended["event"], ended["step"]) == ("finished", 4)
    assert read_run(tmp_path / "run").state == "finished"


def test_earlier_events_are_kept_on_resume(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, 4, BigbatchError("the disk is on fire."))
        with pytest.raises(BigbatchError):
            train.run(TrainConfig(out=run, **settings))
    assert events(run)[-1]["why"] == "the disk is on fire."
    assert read_run(run).state == "failed"
    with (run / "events.jsonl").open("a") as file:
        file.write('{"event": "resu')  # a process that was killed while it wrote
    assert resume.run(TrainConfig(sample_prompt="x"), ResumeOptions(run=run)) == 0
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    went_on = json.loads(lines[3])
    assert [went_on[key] for key in ("event", "step", "checkpoint", "passed_over")] == ["resume", 2, "step-2", []]
    assert went_on["settings"] == {"sample_prompt": "x"}
    found = read_run(run)
    assert [event["event"] for event in found.events] == ["begin", "failed", "resume", "finished"]
    assert list(found.columns.steps) == [1, 2, 3, 4]
    assert (found.settings["sample_prompt"], found.changed) == ("x", frozenset({"sample_prompt"}))


def test_deterministic_run_logs_no_time(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert train.run(TrainConfig(out=tmp_path / "run", deterministic=True, **settings)) == 0
    assert [(event["at"], event.get("elapsed_s")) for event in events(tmp_path / "run")] == [(None, None)] * 2
    assert events(tmp_path / "run")[0]["process_bytes"] is None


def test_run_continues_when_events_are_unwritable(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = tmp_path / "run"
    real = train.RunDirectory.create
    with pytest.MonkeyPatch.context() as patch:

        def create(path: Path, config: Any) -> Any:
            directory = real(path, config)
            (path / "events.jsonl").mkdir()
            return directory

        patch.setattr(train.RunDirectory, "create", create)
        assert train.run(TrainConfig(out=run, **settings)) == 0
    assert (run / "model").is_dir()
