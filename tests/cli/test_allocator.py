"""The configuration of torch's allocator that the commands set with ``--offload``."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from bigbatch.cli import main, session
from bigbatch.cli.session import ALLOCATORS, enable_expandable_segments
from bigbatch.lm.config.train_config import TrainConfig
from support.language_models import records, save_model_folder, write_jsonl

EXPANDABLE = "expandable_segments:True"


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATORS:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


@pytest.mark.parametrize("level", ["optimizer", "master", "gradients", "auto"])
def test_segments_grow_with_offload(level: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    enable_expandable_segments(TrainConfig(offload=level))
    assert os.environ["PYTORCH_ALLOC_CONF"] == EXPANDABLE


@pytest.mark.parametrize("platform", ["linux", "win32", "darwin"])
def test_segments_stay_as_they_are_otherwise(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    enable_expandable_segments(TrainConfig(offload="none" if platform == "linux" else "auto"))
    assert not any(name in os.environ for name in ALLOCATORS)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_allocator_of_the_environment_stays_configured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv(name, "max_split_size_mb:128")
    enable_expandable_segments(TrainConfig(offload="auto"))
    assert {each: os.environ[each] for each in ALLOCATORS if each in os.environ} == {name: "max_split_size_mb:128"}


def test_train_and_resume_configure_the_allocator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.sys, "platform", "linux")
    model, data = save_model_folder(tmp_path / "base"), write_jsonl(tmp_path / "data.jsonl", records(24))
    flags = ["--model", str(model), "--data", str(data), "--global-batch", "4", "--max-length", "32", "--steps", "2"]
    flags += ["--device", "cpu", "--microbatch", "2", "--offload", "optimizer", "--out", str(tmp_path / "run")]
    for command in (["train", *flags], ["resume", str(tmp_path / "run")]):
        monkeypatch.delenv(ALLOCATORS[0], raising=False)
        assert main(command) == 0
        assert os.environ[ALLOCATORS[0]] == EXPANDABLE
