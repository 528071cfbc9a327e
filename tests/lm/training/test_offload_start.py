"""Runs whose narrow weights never reach the device in float32, and what runs before their first window."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch import lm
from bigbatch.cli import main
from bigbatch.errors import MemoryLimitError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.start import move_model
from bigbatch.lm.training import reference
from bigbatch.lm.training.engine_factory import make_training_engine
from bigbatch.lm.training.setup import TrainingSetup, set_up_training
from bigbatch.lm.training.trainer import Trainer
from bigbatch.offload import host_memory, model_move
from bigbatch.offload.host_values import host_value
from bigbatch.offload.transfers import Transfers
from bigbatch.verification import verify
from offload.models import small_chunks, streamed_of
from support.language_models import (
    examples,
    metrics,
    pairs,
    records,
    run,
    save_model_folder,
    write_jsonl,
)
from support.run_comparison import CLOCK, results
from support.tiers import slow

LEVELS = ("none", "master", "gradients")


@pytest.fixture(autouse=True)
def chunks_are_small() -> Iterator[None]:
    with small_chunks():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for kind in ("llama", "qwen2"):
        save_model_folder(folder / kind, kind=kind)
    write_jsonl(folder / "data.jsonl", records(24))
    write_jsonl(folder / "pairs.jsonl", pairs(24))
    write_jsonl(folder / "examples.jsonl", examples(24))
    return folder


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    given = {"model": str(folder / "llama"), "data": (str(folder / "data.jsonl"),), "global_batch": 4, "microbatch": 2}
    given |= {"max_length": 32, "lr": 0.01, "deterministic": True, "precision": "bf16", "no_cache": True}
    return given | more


def set_up(folder: Path, **more: Any) -> TrainingSetup:
    return set_up_training(TrainConfig(device="cpu", **settings(folder, **more)))


def held(setup: TrainingSetup) -> set[str]:
    return {name for name, p in setup.model.named_parameters() if host_value(p) is not None}


def comparable(path: Path) -> dict[str, Any]:
    """Return the results of a run but for the level of offload."""
    found = results(path)
    return {**found, "state": json.loads(found["state"])["progress"]}


# the whole run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"layout": "packed", "microbatch": None, "token_budget": 64},
        slow({"gradient_checkpointing": "full", "optimizer": "muon"}),
        slow({"optimizer": "lion"}),
        slow({"objective": "dpo", "data": "pairs"}),
        slow({"objective": "reward", "data": "pairs"}),
        slow({"model": "qwen2"}),
        slow({"model": "tiny", "max_length": 64}),
    ],
    ids=str,
)
def test_run_has_equal_bits(folder: Path, tmp_path: Path, more: dict[str, Any]):
    if more.get("data") == "pairs":
        more = more | {"data": (str(folder / "pairs.jsonl"),)}
    if more.get("model") == "qwen2":
        more = more | {"model": str(folder / "qwen2")}
    found = []
    for level in LEVELS:
        given = settings(folder, steps=5, checkpoint_every=2, validation_every=2, validation_fraction=0.2)
        setup, _, _ = run(tmp_path / level, **given | more, offload=level)
        assert any(p.dtype is torch.bfloat16 for p in setup.model.parameters()) == (level != "none")
        found.append(comparable(tmp_path / level))
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize(
    "more", [{"lora_rank": 2}, slow({"objective": "embedding"}), slow({"precision": "float32"})], ids=str
)
def test_weights_that_stay_wide_start_wide(folder: Path, tmp_path: Path, more: dict[str, Any]):
    more = more | ({"data": (str(folder / "examples.jsonl"),)} if "objective" in more else {})
    found = []
    for level in ("none", "gradients"):
        given = settings(folder) | more
        assert not held(set_up_training(TrainConfig(device="cpu", offload=level, **given)))
        run(tmp_path / level, **given, steps=3, offload=level)
        found.append(comparable(tmp_path / level))
    assert found[0] == found[1]


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> list[Transfers]:
    found: list[Transfers] = []

    def make_transfers(device: torch.device) -> Transfers:
        found.append(Transfers(device))
        return found[-1]

    monkeypatch.setattr(model_move, "make_transfers", make_transfers)
    return found


@pytest.mark.parametrize("level", ["master", "gradients"])
def test_float32_values_stay_on_host_until_first_window(folder: Path, level: str, links: list[Transfers]):
    """Every weight of a linear layer: nothing that runs until then has put one on the device."""
    setup = set_up(folder, offload=level)
    linear = {f"{n}.weight": m.weight for n, m in setup.model.named_modules() if type(m) is nn.Linear}
    assert held(setup) == set(linear)
    assert all(weight.dtype is torch.bfloat16 for weight in linear.values())
    (link,) = links
    assert link.counts.bytes_to_device == 2 * sum(weight.numel() for weight in linear.values())
    trainer = Trainer(setup)
    trainer.tune()
    trainer.validate()
    assert held(setup) == set(linear)
    trainer.engine.accumulator.prepare()
    counts = streamed_of(trainer.engine).transfers.counts
    assert counts.bytes_to_host == sum(8 * p.numel() for p in setup.model.parameters())  # AdamW's state


# before the first window -------------------------------------------------------------------------------------------


def test_start_of_a_run_is_the_same(folder: Path):
    """Fingerprints, layout, loss and notes; validation, text, and the state of update 0."""
    found = []
    for level in LEVELS:
        setup = set_up(folder, offload=level, validation_fraction=0.2, layout="packed")
        trainer = Trainer(setup)
        state = trainer.engine.state_dict()
        found.append(
            {
                "weights": trainer.initial_facts["weights_sha256"],
                "frozen": trainer.initial_facts["frozen_sha256"],
                "set-up": (setup.model_setup.layout, type(setup.loss_fn), setup.model_setup.notes),
                "validation": trainer.validate(),
                "text": trainer.sample_text(),
                "state": {name: (str(t.dtype), t.tolist()) for name, t in state["model"].items()},
                "random": repr(state["random"]),
            }
        )
    assert found[1] == found[0]
    assert found[2] == found[0]


@pytest.mark.slow
def test_killed_run_resumes_with_equal_bits(folder: Path, tmp_path: Path):
    """Also at another level than before; `test_resume_end_to_end` kills the process."""

    class KilledError(Exception): ...

    data = str(folder / "data.jsonl")
    given = settings(folder, data=(data,), epochs=1, checkpoint_every=2, validation_every=1, validation_fraction=0.2)
    lm.train({**given, "device": "cpu", "out": str(tmp_path / "none")})

    class Killer(lm.Callback):
        def on_update(self, row: Any) -> None:
            if row["step"] == 3:
                raise KilledError

    for before, after in (("master", "gradients"), ("gradients", "none"), ("none", "gradients")):
        path = tmp_path / f"{before}-{after}"
        with pytest.raises(KilledError):
            lm.train({**given, "device": "cpu", "out": str(path), "offload": before}, callbacks=[Killer()])
        lm.train({"offload": after}, resume=path)
        assert comparable(path) == comparable(tmp_path / "none")


def test_second_engine_of_a_trainer_steps(folder: Path):
    """As an experiment with branches makes one for the checkpoint of a run."""
    found = []
    for level in ("none", "master"):
        setup = set_up(folder, offload=level)
        trainer = Trainer(setup)
        engine = make_training_engine(setup, trainer.optimizer)
        engine.load_state_dict({**trainer.engine.state_dict(), "scheduler": None})
        engine.step(trainer.fetch(trainer.schedule.first_window()))
        found.append({name: tensor.tolist() for name, tensor in engine.state_dict()["model"].items()})
    assert found[0] == found[1]


def test_reference_that_is_lost_is_checked_with_float32_weights(folder: Path, monkeypatch: pytest.MonkeyPatch):
    setup = set_up(folder, offload="master", objective="dpo", data=(str(folder / "pairs.jsonl"),))
    trainer = Trainer(setup)
    trainer.engine.accumulator.prepare()  # as tuning does
    found = []
    monkeypatch.setattr(reference, "_check_start", lambda setup, _: found.append(reference.weights_fingerprint(setup)))
    trainer.prepare(Path("run"))
    assert found == [trainer.initial_facts["weights_sha256"]]


def test_host_without_room_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    setup = set_up(folder, offload="gradients")
    monkeypatch.setattr(host_memory, "host_memory", lambda: (2**16, 2**40))
    with pytest.raises(
        MemoryLimitError, match=r"^offload gradients needs .* of pinned host memory, and 48\.0 KiB are "
    ):
        Trainer(setup)


def test_verification_has_float32_gradients(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Which are compared outside of an engine."""
    words = ["verify", "--data", str(folder / "data.jsonl"), "--model", str(folder / "llama"), "--device", "cpu"]
    words += ["--precision", "bf16", "--samples", "6", "--json", "--offload", "master"]
    dtypes: set[torch.dtype] = set()
    original = verify.verify

    def recording(model: nn.Module, *arguments: Any, **given: Any) -> Any:
        dtypes.update(p.dtype for p in model.parameters())
        return original(model, *arguments, **given)

    monkeypatch.setattr(verify, "verify", recording)
    assert main(words) == 0
    assert dtypes == {torch.float32}


# weights that are read elsewhere -----------------------------------------------------------------------------------


def penalized_loss(model: Any, microbatch: dict[str, Tensor]) -> tuple[Tensor, int]:
    logits = model(microbatch["input_ids"], attention_mask=microbatch["attention_mask"]).logits
    labels = microbatch["labels"].flatten()
    loss_sum = F.cross_entropy(logits.float().flatten(0, 1), labels, ignore_index=-100, reduction="sum")
    penalty = model.lm_head.weight.float().square().mean()
    number = int((labels >= 0).sum())
    return loss_sum + number * penalty, number


def test_weight_that_own_loss_reads_is_float32_before_first_window(folder: Path, tmp_path: Path):
    data = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    given = {name: value for name, value in settings(folder).items() if name not in ("data", "no_cache")}
    found, dtypes = [], []

    class Watch(lm.Callback):
        def on_start(self, start: Any) -> None:
            dtypes.append(start.model.lm_head.weight.dtype)
            assert any(p.dtype is torch.bfloat16 for p in start.model.parameters()) == (level != "none")

    for level in LEVELS:
        config = {**given, "device": "cpu", "out": str(tmp_path / level), "steps": 4, "offload": level}
        lm.train(config, data, loss_fn=penalized_loss, callbacks=[Watch()])
        found.append([{k: v for k, v in row.items() if k not in CLOCK} for row in metrics(tmp_path / level)])
    assert dtypes == 3 * [torch.float32]
    assert found[1] == found[0]
    assert found[2] == found[0]


class Uncast(nn.Module):
    """A model with a layer that runs outside of autocast, on inputs of another dtype or of that of its weight."""

    def __init__(self, cast: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cast, self.embedding = cast, nn.Embedding(30, 8)
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 30, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = self.inner(self.embedding(input_ids))
        with torch.autocast("cpu", enabled=False):
            logits = self.outer(hidden.to(self.outer.weight.dtype) if self.cast else hidden.float())
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize(("cast", "wide"), [(True, {"outer"}), (False, {"inner", "outer"})])
def test_layer_outside_of_autocast_starts_wide(cast: bool, wide: set[str]):
    config = TrainConfig(offload="master", precision="bf16")
    model, expected = Uncast(cast), Uncast(cast)
    random = torch.get_rng_state()
    assert move_model(model, config, DeviceSpec(torch.device("cpu"), "bf16")) is model
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert {name for name in ("inner", "outer") if getattr(model, name).weight.dtype is torch.float32} == wide
    for name in wide:
        assert torch.equal(getattr(model, name).weight, getattr(expected, name).weight)
