"""The configuration of torch's allocator that the commands set with ``--offload``."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bigbatch.cli import main
from bigbatch.cli.commands import resume, train
from bigbatch.cli.session import (
    ALLOCATORS,
    EXPANDABLE,
    disable_unsupported_segments,
    enable_expandable_segments,
)
from bigbatch.cli.torchrun import process_group
from bigbatch.lm.config.train_config import TrainConfig
from support.language_models import records, save_model_folder, write_jsonl


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


def test_segments_stay_as_they_are_in_linux_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    enable_expandable_segments(TrainConfig(offload="auto"))
    assert not any(name in os.environ for name in ALLOCATORS)


@pytest.mark.parametrize(
    ("error", "device", "is_kept"),
    [
        (None, "auto", True),
        (RuntimeError("CUDA driver error: operation not supported"), "auto", False),
        (RuntimeError("CUDA driver error: operation not supported"), "cuda:0", False),
        (RuntimeError("not asked"), "cpu", True),
        (torch.OutOfMemoryError("CUDA out of memory."), "cuda", True),
    ],
)
def test_segments_are_disabled_where_the_driver_refuses(
    error: Exception | None, device: str, is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: list[str] = []

    def allocate(*_: object, device: str) -> None:
        if error is not None:
            raise error

    monkeypatch.setenv(ALLOCATORS[0], EXPANDABLE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", settings.append)
    monkeypatch.setattr(torch, "empty", allocate)
    disable_unsupported_segments(device)
    assert settings == ([] if is_kept else ["expandable_segments:False"])
    assert (ALLOCATORS[0] in os.environ) is is_kept


def test_train_and_resume_configure_the_allocator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str | None] = []

    def note(config: TrainConfig) -> Any:
        found.append(os.environ.get(ALLOCATORS[0]))
        return process_group(config)

    monkeypatch.setattr(sys, "platform", "linux")
    for command_module in (train, resume):
        monkeypatch.setattr(command_module, "process_group", note)
    model, data = save_model_folder(tmp_path / "base"), write_jsonl(tmp_path / "data.jsonl", records(24))
    flags = ["--model", str(model), "--data", str(data), "--global-batch", "4", "--max-length", "32", "--steps", "2"]
    flags += ["--device", "cpu", "--microbatch", "2", "--offload", "optimizer", "--out", str(tmp_path / "run")]
    for command in (["train", *flags], ["resume", str(tmp_path / "run")]):
        monkeypatch.delenv(ALLOCATORS[0], raising=False)
        found.clear()
        assert main(command) == 0
        assert found == [EXPANDABLE], "set before ranks are started, which may use CUDA"
