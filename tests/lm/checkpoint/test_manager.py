"""Saving beside the training: the state is that of the moment, and what goes wrong there is not lost."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigbatch
from bigbatch.errors import CheckpointError
from bigbatch.lm.checkpoint import manager as keeper_module
from bigbatch.lm.checkpoint.hashed_file import HashedFile
from bigbatch.lm.checkpoint.manager import CheckpointManager, frozen_fingerprint
from bigbatch.lm.checkpoint.run_checkpoint import Progress, load
from bigbatch.lm.checkpoint.state_tree import copy_to_cpu, equal
from bigbatch.lm.runs.directory import RunDirectory
from support.checkpoints import no_space

FACTS: dict[str, Any] = {
    "settings": {"seed": 0}, "data_sha256": "d", "num_samples": 9, "vocabulary_sha256": "v", "weights_dtype": "w",
    "frozen_sha256": None,
}  # fmt: skip


def loss_fn(model: nn.Module, inputs: Tensor) -> tuple[Tensor, int]:
    return model(inputs).square().sum(), len(inputs)


@pytest.fixture
def engine() -> bigbatch.Engine:
    model = nn.Linear(3, 2)
    return bigbatch.Engine(model, torch.optim.AdamW(model.parameters(), lr=0.1), loss_fn, microbatch=2)


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", {})


def a_keeper(directory: RunDirectory) -> CheckpointManager:
    return CheckpointManager(directory, keep=2, in_background=True, total_steps=9, facts=FACTS)


def test_async_write_saves_state_of_its_moment(
    engine: bigbatch.Engine, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on = threading.Event()
    write = keeper_module.write

    def late(*words: Any, **options: Any) -> Path:
        assert trained_on.wait(60)
        return write(*words, **options)

    monkeypatch.setattr(keeper_module, "write", late)
    with directory, a_keeper(directory).open() as keeper:
        engine.step(torch.ones(4, 3))
        expected = copy_to_cpu(engine.state_dict())
        now = Progress(step=1, cursor=4)
        keeper.save(engine, now, "none")
        now.step = 2
        engine.step(torch.ones(4, 3))
        trained_on.set()
    saved, rejected = load(directory.path)
    assert saved is not None
    assert rejected == ()
    assert equal(saved.engine, expected)
    assert (saved.progress, saved.total_steps, saved.facts) == (Progress(step=1, cursor=4), 9, FACTS)


@pytest.mark.parametrize("again", [True, False], ids=["at the next", "at the end"])
def test_async_write_error_is_raised(
    engine: bigbatch.Engine, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    monkeypatch.setattr(HashedFile, "write", lambda *_, **__: no_space("beside"))
    reached = []

    def two_checkpoints() -> None:
        with directory, a_keeper(directory).open() as keeper:
            keeper.save(engine, Progress(step=1), "none")
            reached.append(1)
            if again:
                keeper.save(engine, Progress(step=2), "none")
                reached.append(2)

    with pytest.raises(
        CheckpointError, match=r"^checkpoint step-1 could not be written to .*: no space left on device"
    ):
        two_checkpoints()
    assert reached == [1]


def test_run_without_checkpoints_loads_none(directory: RunDirectory) -> None:
    assert load(directory.path) == (None, ())


def test_fingerprint_covers_every_bit_of_frozen_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    assert frozen_fingerprint(model) is None
    model[0].requires_grad_(False)
    before = frozen_fingerprint(model)
    with torch.no_grad():
        model[1].weight.add_(1)
        assert frozen_fingerprint(model) == before
        model[0].bias[0] = torch.nextafter(model[0].bias[0], torch.tensor(torch.inf))
    assert frozen_fingerprint(model) not in (before, None)
