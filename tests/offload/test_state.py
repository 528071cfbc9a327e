"""States of a run with offload: captured from host memory, loaded into it, with the bits of a run without."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bigbatch
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.training.resume import merge_config
from offload.models import (
    OPTIMIZERS,
    is_in_buffers,
    make_batch,
    make_engine,
    make_model,
    plain_state,
    streamed_of,
    values,
)
from support.language_models import records, run, save_model_folder, write_jsonl

NAMES = ["adamw", "adamw-fused", "sgd", "adagrad", "rmsprop", "adafactor", "nadam", "muon"]


def make(name: str, level: str, seed: int = 1, dtype: torch.dtype = torch.float32) -> bigbatch.Engine:
    model = make_model(seed, dtype)
    return make_engine(model, OPTIMIZERS[name](list(model.parameters())), level)


def train(engine: bigbatch.Engine, first: int, last: int) -> None:
    for number in range(first, last):
        inputs, labels = make_batch(number)
        engine.step((inputs.to(next(engine.model.parameters()).dtype), labels))


@pytest.mark.parametrize("levels", [("optimizer", "optimizer"), ("none", "optimizer"), ("optimizer", "none")], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_resumed_run_has_equal_bits(name: str, levels: tuple[str, str], tmp_path: Path):
    expected = make(name, "none")
    train(expected, 0, 6)
    before = make(name, levels[0])
    train(before, 0, 3)
    torch.save(before.state_dict(), tmp_path / "state.pt")
    after = make(name, levels[1], seed=2)
    after.load_state_dict(torch.load(tmp_path / "state.pt"))
    train(after, 3, 6)
    assert torch.equal(values(after.model), values(expected.model))
    of = [plain_state(optimizer) for optimizer in after.accumulator.update.optimizers]
    assert of == [plain_state(optimizer) for optimizer in expected.accumulator.update.optimizers]


@pytest.mark.parametrize("trained", [0, 2])
def test_state_loads_into_engine_that_has_trained(trained: int):
    source, target, expected = make("adamw", "optimizer"), make("adamw", "optimizer", seed=2), make("adamw", "none")
    train(source, 0, 3)
    train(target, 0, trained)
    train(expected, 0, 5)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    train(target, 3, 5)
    assert torch.equal(values(target.model), values(expected.model))


def test_state_dict_makes_no_transfer():
    engine = make("adamw", "optimizer")
    train(engine, 0, 2)
    streamed = streamed_of(engine)
    before = copy.copy(streamed.transfers.counts)
    found = engine.state_dict()["optimizer"]["state"]
    assert streamed.transfers.counts == before
    assert found
    assert all(is_in_buffers(entry["exp_avg"], streamed) for entry in found.values())


def test_own_state_can_be_loaded_back():
    engine, expected = make("adamw", "optimizer"), make("adamw", "none")
    train(engine, 0, 2)
    engine.load_state_dict(engine.state_dict())
    train(engine, 2, 4)
    train(expected, 0, 4)
    assert torch.equal(values(engine.model), values(expected.model))


def test_load_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    engine, other, expected = make("adamw", "optimizer"), make("adamw", "none", seed=2), make("adamw", "none")
    train(engine, 0, 2)
    train(other, 0, 1)
    train(expected, 0, 4)
    with monkeypatch.context() as patch:
        patch.setattr(
            "bigbatch.accumulation.training_state.set_random_states", lambda *_: (_ for _ in ()).throw(OSError)
        )
        with pytest.raises(OSError):  # noqa: PT011 - of the line above
            engine.load_state_dict(other.state_dict())
    train(engine, 2, 4)
    assert torch.equal(values(engine.model), values(expected.model))


def test_state_of_optimizer_alone_is_loaded_into_host_memory():
    engine, expected = make("adamw", "optimizer"), make("adamw", "none")
    train(engine, 0, 2)
    train(expected, 0, 3)
    (optimizer,) = engine.accumulator.update.optimizers
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in optimizer.state.values():
        entry["exp_avg"].zero_()
    optimizer.load_state_dict(saved)
    train(engine, 2, 3)
    assert torch.equal(values(engine.model), values(expected.model))


def test_tensor_that_was_replaced_in_state_is_used():
    found = []
    for level in ("none", "optimizer"):
        engine = make("adamw", level)
        train(engine, 0, 2)
        for entry in engine.accumulator.update.optimizers[0].state.values():
            entry["exp_avg"] = entry["exp_avg"] * 2
        train(engine, 2, 4)
        found.append(values(engine.model))
    assert torch.equal(*found)


def test_training_run_has_equal_bits(tmp_path: Path):
    model = str(save_model_folder(tmp_path / "model"))
    data = str(write_jsonl(tmp_path / "data.jsonl", records(24)))
    found = []
    for level in ("none", "optimizer"):
        settings = {"model": model, "data": (data,), "global_batch": 4, "microbatch": 2, "max_length": 32, "lr": 0.01}
        run(tmp_path / level, **settings, steps=4, checkpoint_every=2, deterministic=True, offload=level)
        found.append(load_file(tmp_path / level / "model" / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_resume_may_change_offload(tmp_path: Path):
    stored = TrainConfig(out=tmp_path, offload="optimizer").resolved()
    assert merge_config(stored, TrainConfig(offload="none"), allowed=()).offload == "none"
