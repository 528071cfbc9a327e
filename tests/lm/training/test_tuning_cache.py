"""A choice that a run made is taken by the next for the same job, and by no other."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bigbatch.autotune.choice import MicrobatchChoice, Trial
from bigbatch.autotune.time_model import TimeModel
from bigbatch.lm.config.field_types import CHECKPOINTING_MODES, CheckpointingMode
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.runs.file_names import TUNED_MICROBATCH
from bigbatch.lm.training import microbatch_tuner, tuning_cache
from bigbatch.lm.training.setup import set_up_training
from bigbatch.lm.training.trainer import Trainer
from bigbatch.lm.training.tuning_cache import CachedChoice, cache_key, load_cached, save_cached
from support.language_models import RecordingCallback, records, save_model_folder, write_jsonl

CHOICE = MicrobatchChoice(
    size=4096,
    longest=512,
    unit="tokens",
    peak_bytes=10**9,
    limit_bytes=2 * 10**9,
    per_s=1234.5,
    largest=8192,
    trials=(Trial(512, 1000.0), Trial(4096, 1234.5)),
    timing=TimeModel(((512, 0.25), (4096, 1.5))),
)


PLAIN = {name: value for name, value in vars(CHOICE).items() if name not in ("trials", "timing")}


def written(**changes: object) -> bytes:
    """A file whose choice is whole but for some changes; ``...`` leaves a key out."""
    whole = {"key": "this job", "level": "none", **PLAIN, "trials": [], "timing": {"points": []}} | changes
    return json.dumps({name: value for name, value in whole.items() if value is not ...}).encode()


def test_complete_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / TUNED_MICROBATCH).write_bytes(written())
    assert load_cached(tmp_path / "run", "this job") is not None


@pytest.mark.parametrize(
    "changes",
    [{"size": "4096"}, {"size": True}, {"size": 2**70}, {"unit": "rows"}, {"per_s": float("nan")}, {"trials": [{}]},
     {"timing": {"points": [[1]]}}, {"peak_bytes": None}, {"extra": 1}],
)  # fmt: skip
def test_choice_with_invalid_field_is_ignored(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / TUNED_MICROBATCH).write_bytes(written(**changes))
    assert load_cached(tmp_path / "run", "this job") is None


def test_pipe_in_place_of_cache_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / TUNED_MICROBATCH)
    assert load_cached(tmp_path / "run", "this job") is None


def kept(
    folder: Path, choice: MicrobatchChoice = CHOICE, key: str = "this job", level: CheckpointingMode = "selective"
) -> Path:
    folder.mkdir(parents=True)
    save_cached(folder, choice, key, checkpointing_mode=level)
    return folder


def found(folder: Path, choice: MicrobatchChoice = CHOICE) -> CachedChoice:
    return CachedChoice(choice, "selective", folder)


def test_choice_round_trips(tmp_path: Path) -> None:
    folder = kept(tmp_path / "run")
    assert load_cached(folder, "this job") == found(folder)
    unpredicted = MicrobatchChoice(
        **vars(CHOICE) | {"prediction_failure": "the step cannot run without data (für)", "limited": True}
    )
    again = kept(tmp_path / "again", unpredicted)
    assert load_cached(again, "this job") == found(again, unpredicted)


@pytest.mark.parametrize("level", CHECKPOINTING_MODES)
def test_recomputation_level_round_trips(tmp_path: Path, level: CheckpointingMode) -> None:
    folder = kept(tmp_path / "run", level=level)
    assert load_cached(folder, "this job") == CachedChoice(CHOICE, level, folder)


def test_neighbouring_runs_are_searched_newest_first(tmp_path: Path) -> None:
    for name in ("one", "two", "other"):
        kept(tmp_path / name, key="other job" if name == "other" else "this job")
    (tmp_path / "a file").touch()
    (tmp_path / "empty").mkdir()
    for age, name in enumerate(("other", "one", "two")):
        path = tmp_path / name / TUNED_MICROBATCH
        stamp = path.stat().st_mtime - 10 * age
        os.utime(path, (stamp, stamp))
    assert load_cached(tmp_path / "not there yet", "this job") == found(tmp_path / "one")
    assert load_cached(tmp_path / "two", "this job") == found(tmp_path / "two")
    assert load_cached(tmp_path / "not there yet", "a third job") is None
    assert load_cached(tmp_path / "no" / "folder", "this job") is None


def test_choice_above_current_memory_is_ignored(tmp_path: Path) -> None:
    folder = kept(tmp_path / "run")
    assert load_cached(folder, "this job", usable_bytes=CHOICE.peak_bytes) is not None
    assert load_cached(folder, "this job", usable_bytes=CHOICE.peak_bytes - 1) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"3",
        b'"text"',
        b"[]",
        b"\xff\xfe",
        b"{}",
        b"[" * 100_000,
        b'{"key": "this job"}',
        b'{"key": "this job", "size": 3}',
        written(trials=None, timing=None),
        written(timing={"points": [[1, "x"]]}),
        written(new=1),
        written(level="some"),
        written(level=True),
        written(level=["full"]),
        written(level=...),
    ],
)
def test_unreadable_choice_is_skipped(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / TUNED_MICROBATCH).write_bytes(content)
    assert load_cached(tmp_path / "run", "this job") is None
    beside = kept(tmp_path / "beside")
    assert load_cached(tmp_path / "run", "this job") == found(beside)


def test_unwritable_folder_does_not_end_run(tmp_path: Path) -> None:
    save_cached(tmp_path / "not there", CHOICE, "this job", checkpointing_mode="none")
    (tmp_path / TUNED_MICROBATCH).mkdir()
    save_cached(tmp_path, CHOICE, "this job", checkpointing_mode="none")
    assert load_cached(tmp_path, "this job") is None


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("job")
    return {
        "data": str(write_jsonl(folder / "data.jsonl", records(40))),
        "model": str(save_model_folder(folder / "base")),
        "device": "cpu",
        "global_batch": 8,
        "steps": 2,
    }


def fingerprint_of(job: dict[str, Any], **changes: Any) -> str:
    return cache_key(set_up_training(TrainConfig(**job | changes)))


def test_another_job_has_another_fingerprint(job: dict[str, Any], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", records(41))
    changes: list[dict[str, Any]] = [
        {},
        {"model": str(save_model_folder(tmp_path / "gpt2", kind="gpt2"))},
        {"data": str(data)},
        {"memory": "1GiB"},
        {"memory": "50%"},
        {"gpu": "t4"},
        {"precision": "bf16"},
        {"precision": "bf16-weights"},
        {"lora_rank": 2},
        {"lora_rank": 4},
        {"lora_rank": 4, "lora_targets": "q_proj"},
        {"lora_rank": 4, "lora_targets": "o_proj"},
        {"lora_rank": 4, "lora_dropout": 0.1},
        {"gradient_checkpointing": "full"},
        {"gradient_checkpointing": "selective"},
        {"gradient_checkpointing": "none"},
        {"layout": "packed"},
        {"max_length": 20},
        {"global_batch": 9},
        {"global_batch": None, "global_batch_tokens": 100},
    ]
    found = [fingerprint_of(job, **change) for change in changes]
    assert len(set(found)) == len(changes)


def test_irrelevant_settings_keep_fingerprint(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"steps": 5, "lr": 1e-3, "seed": 0, "out": Path("elsewhere"), "warmup_steps": 1, "weight_decay": 0.0}
    assert fingerprint_of(job) == fingerprint_of(job, **changes)
    before = fingerprint_of(job)
    monkeypatch.setattr(tuning_cache, "__version__", "0.0.0")
    assert fingerprint_of(job) != before


def test_run_reuses_choice_of_neighbouring_run(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restarted: list[torch.device] = []
    monkeypatch.setattr(microbatch_tuner, "restart_peak", restarted.append)
    first = Trainer(set_up_training(TrainConfig(**job)))
    assert first.tune(cache=tmp_path / "one") is None
    assert restarted == [torch.device("cpu")]
    first.run(RunDirectory.create(tmp_path / "one", {}), callback=RecordingCallback())
    second = Trainer(set_up_training(TrainConfig(**job)))
    assert second.tune(cache=tmp_path / "two") == tmp_path / "one"
    assert second.engine.choice == first.engine.choice
    lengths = [5, 9, 30, 2, 7, 7, 8, 20]
    assert second.engine.groups(lengths) == first.engine.groups(lengths)
    second.run(RunDirectory.create(tmp_path / "two", {}), callback=RecordingCallback())
    assert (tmp_path / "two" / TUNED_MICROBATCH).read_bytes() == (tmp_path / "one" / TUNED_MICROBATCH).read_bytes()
    assert torch.equal(*(next(trainer.setup.model.parameters()) for trainer in (first, second)))


def test_run_with_given_microbatch_saves_no_choice(job: dict[str, Any], tmp_path: Path) -> None:
    kept(tmp_path / "one")
    trainer = Trainer(set_up_training(TrainConfig(**job, microbatch=4)))
    assert trainer.tune(cache=tmp_path / "two") is None
    trainer.run(RunDirectory.create(tmp_path / "two", {}), callback=RecordingCallback())
    assert not (tmp_path / "two" / TUNED_MICROBATCH).exists()
