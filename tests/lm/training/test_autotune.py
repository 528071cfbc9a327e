"""What is computed anew, and the micro-batch to go with it: as little as memory allows, and no more than is faster."""

import dataclasses
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bigbatch import Engine, MemoryLimitError
from bigbatch.autotune import choice, probe
from bigbatch.autotune.choice import MicrobatchChoice, Trial
from bigbatch.autotune.peak_prediction import state_of
from bigbatch.autotune.time_model import TimeModel
from bigbatch.lm.config.field_types import AUTO_MODES, CHECKPOINTING_MODES, CheckpointingMode
from bigbatch.lm.data.dataset import collate
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.causal_attention import use_causal_attention
from bigbatch.lm.model.causal_lm_loss import CausalLMLoss
from bigbatch.lm.model.decoder_layers import DecoderLayers
from bigbatch.lm.training.autotune import apply_choice, describe, tune
from bigbatch.memory import usage
from bigbatch.memory.allocation_tracker import AllocationTracker, MemoryCategory
from bigbatch.memory.usage import resolve_memory_budget
from support.tiers import slow_except

CPU = torch.device("cpu")


# the search ------------------------------------------------------------------------------------------------------


def choice_of(size: int, per_s: float, *, limited: bool) -> MicrobatchChoice:
    return MicrobatchChoice(
        size=size,
        longest=32,
        unit="tokens",
        peak_bytes=10**6,
        limit_bytes=2 * 10**6,
        per_s=per_s,
        largest=size,
        trials=(Trial(size, per_s),),
        timing=TimeModel(((size, 1.0),)),
        limited=limited,
    )


TOO_LARGE = MemoryLimitError("a sample of 32 tokens does not fit.")


class Scripted:
    """An engine that finds at each level what the script says, and layers that note what they are set to."""

    def __init__(self, **script: MicrobatchChoice | MemoryLimitError) -> None:
        self.script = script
        self.mode: CheckpointingMode = "none"
        self.tried: list[CheckpointingMode] = []
        self.used: list[MicrobatchChoice] = []

    def set_checkpointing(self, mode: CheckpointingMode) -> None:
        self.mode = mode

    def tune(self, _: list[Any]) -> MicrobatchChoice:
        self.tried.append(self.mode)
        found = self.script[self.mode]
        if isinstance(found, MemoryLimitError):
            raise found
        return found

    def set_microbatch(self, found: MicrobatchChoice) -> None:
        self.used.append(found)


SEARCHES: dict[str, tuple[dict[str, Any], list[CheckpointingMode], CheckpointingMode]] = {
    "memory does not limit": (
        {"none": choice_of(64, 10.0, limited=False)}, ["none"], "none",
    ),
    "the next is slower": (
        {"none": choice_of(64, 10.0, limited=True), "selective": choice_of(128, 9.0, limited=True)},
        ["none", "selective"], "none",
    ),
    "the next is hardly faster": (
        {"none": choice_of(64, 10.0, limited=True), "selective": choice_of(128, 10.1, limited=True)},
        ["none", "selective"], "none",
    ),
    "the next is faster and has memory to spare": (
        {"none": choice_of(64, 10.0, limited=True), "selective": choice_of(128, 11.0, limited=False)},
        ["none", "selective"], "selective",
    ),
    "recomputing all layers is slower": (
        {
            "none": choice_of(64, 10.0, limited=True), "selective": choice_of(128, 11.0, limited=True),
            "full": choice_of(256, 10.5, limited=True),
        },
        ["none", "selective", "full"], "selective",
    ),
    "the last is the fastest": (
        {
            "none": choice_of(64, 10.0, limited=True), "selective": choice_of(128, 11.0, limited=True),
            "full": choice_of(256, 12.0, limited=True),
        },
        ["none", "selective", "full"], "full",
    ),
    "nothing fits before the last": (
        {"none": TOO_LARGE, "selective": TOO_LARGE, "full": choice_of(32, 1.0, limited=True)},
        ["none", "selective", "full"], "full",
    ),
    "the first that fits has memory to spare": (
        {"none": TOO_LARGE, "selective": choice_of(64, 1.0, limited=False)}, ["none", "selective"], "selective",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SEARCHES)
def test_levels_are_tried_while_faster_under_limit(case: str) -> None:
    script, tried, best = SEARCHES[case]
    engine = Scripted(**script)
    assert tune(engine, engine, [], modes=True) == (best, script[best])  # type: ignore[arg-type]
    assert engine.tried == tried
    assert engine.mode == best
    assert engine.used == [script[best]]


@pytest.mark.parametrize(("fixed_tokens", "tried"), [(3, ["none"]), (30, ["none", "selective"])])
def test_recomputation_is_tried_only_if_fixed_time_is_long(fixed_tokens: int, tried: list[CheckpointingMode]) -> None:
    timing = TimeModel(tuple((size, float(fixed_tokens + size)) for size in (16, 64)))
    none = dataclasses.replace(choice_of(64, 10.0, limited=True), timing=timing)
    engine = Scripted(none=none, selective=choice_of(128, 9.0, limited=True))
    tune(cast("Any", engine), cast("Any", engine), [], modes=True)
    assert engine.tried == tried


def test_no_fitting_level_reports_needs_of_last() -> None:
    last = MemoryLimitError("a sample of 32 tokens needs 3 MiB.")
    engine = Scripted(none=TOO_LARGE, selective=TOO_LARGE, full=last)
    with pytest.raises(MemoryLimitError) as caught:
        tune(engine, engine, [], modes=True)  # type: ignore[arg-type]
    assert caught.value is last
    assert engine.tried == list(AUTO_MODES)


@pytest.mark.parametrize("level", CHECKPOINTING_MODES)
def test_fixed_level_is_the_only_one_tried(level: CheckpointingMode) -> None:
    found = choice_of(64, 10.0, limited=True)
    engine = Scripted(**{level: found})
    engine.set_checkpointing(level)
    assert tune(engine, engine, [], modes=False) == (level, found)  # type: ignore[arg-type]
    assert engine.tried == [level]
    refusing = Scripted(**{level: TOO_LARGE})
    refusing.set_checkpointing(level)
    with pytest.raises(MemoryLimitError):
        tune(refusing, refusing, [], modes=False)  # type: ignore[arg-type]
    assert refusing.tried == [level]


@pytest.mark.parametrize("levels", [False, True])
def test_model_without_layers_needs_one_search(levels: bool) -> None:
    found = choice_of(64, 10.0, limited=True)
    engine = Scripted(none=found)
    assert tune(engine, None, [], modes=levels) == ("none", found)  # type: ignore[arg-type]
    assert engine.tried == ["none"]


def test_cached_choice_is_reused() -> None:
    found = choice_of(64, 10.0, limited=True)
    engine = Scripted()
    apply_choice(engine, engine, "selective", found)  # type: ignore[arg-type]
    assert (engine.mode, engine.used) == ("selective", [found])
    apply_choice(engine, None, "none", found)  # type: ignore[arg-type]
    assert engine.mode == "selective"


def test_recomputation_is_reported_when_used() -> None:
    assert [describe(level) for level in CHECKPOINTING_MODES] == [
        "",
        ", activation checkpointing in every second layer",
        ", activation checkpointing in all layers",
        ", activation checkpointing in all layers with their inputs in host memory",
    ]  # fmt: skip


# with a real engine ----------------------------------------------------------------------------------------------


LENGTHS = (240, 240, 200, 40)


@pytest.fixture(autouse=True)
def _time_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks at the time."""
    monkeypatch.setattr(probe, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(choice, "MAX_PROBING_S", float("inf"))


@pytest.fixture
def larger_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the time of a batch fall with the size of its micro-batches, whatever the clock says."""
    monkeypatch.setattr(choice._Search, "_batch_seconds", lambda _, size: 1000.0 / size)


class Run:
    """A small Llama, its engine and some samples."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        self.model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=60, max_position_embeddings=256)).train()
        use_causal_attention(self.model)
        self.layers = DecoderLayers(self.model)
        tokens = [torch.arange(length) % 60 for length in LENGTHS]
        self.samples = [{"input_ids": row, "labels": row.roll(-1)} for row in tokens]
        self.engine = Engine(
            self.model,
            torch.optim.AdamW(self.model.parameters()),
            CausalLMLoss(DeviceSpec(CPU, "float32"), needs_mask=False),
            collate=lambda rows: collate(rows, pad_id=0),
            lengths=lambda rows: [len(row["input_ids"]) for row in rows],
        )
        self.engine.accumulator.prepare()
        self.tried: list[CheckpointingMode] = []
        self.found: list[MicrobatchChoice] = []
        real_tune = self.engine.tune

        def watched(samples: Any) -> MicrobatchChoice:
            self.tried.append(self.layers.mode)
            self.found.append(real_tune(samples))
            return self.found[-1]

        monkeypatch.setattr(self.engine, "tune", watched)
        monkeypatch.setattr(usage, "_resident_bytes", lambda: 2**30)

    @property
    def held(self) -> list[Tensor]:
        optimizer = self.engine.accumulator.optimizer
        return [*self.model.parameters(), *self.model.buffers(), *state_of(optimizer)]

    def limit(self, usable_bytes: int) -> None:
        """Ask for so much memory that tensors may take some bytes of it, whatever this process holds besides."""
        others_bytes = 2**30 - sum(tensor.nbytes for tensor in self.held)
        self.engine.memory = others_bytes + -(-usable_bytes * 100 // 95)
        assert resolve_memory_budget(self.engine.memory, CPU, self.held).usable_bytes in range(
            usable_bytes, usable_bytes + 2
        )

    def peak_bytes(self, level: CheckpointingMode, num_samples: int = 1) -> int:
        """What a step of so many of the longest sample takes at a level."""
        self.layers.set_checkpointing(level)
        engine = Engine(
            self.model,
            torch.optim.AdamW(self.model.parameters()),
            self.engine.loss_fn,
            microbatch=num_samples,
            collate=self.engine.collate,
        )
        engine.accumulator.prepare()
        engine.step([self.samples[0]] * num_samples)
        with AllocationTracker(CPU) as tracker:
            tracker.track([*self.model.parameters(), *self.model.buffers()], MemoryCategory.PARAMETERS)
            tracker.track(state_of(engine.accumulator.optimizer), MemoryCategory.OPTIMIZER)
            engine.step([self.samples[0]] * num_samples)
        self.layers.set_checkpointing("none")
        return tracker.peak_bytes


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(monkeypatch)


@pytest.mark.parametrize("level", slow_except(AUTO_MODES[1:], "full"))
def test_sample_that_fits_only_recomputed_is_trained(made: Run, level: CheckpointingMode) -> None:
    *before, last = AUTO_MODES[: AUTO_MODES.index(level) + 1]
    more, less = made.peak_bytes(before[-1]), made.peak_bytes(last)
    assert less < 0.95 * more
    made.limit(usable_bytes := (more + less) // 2)
    found, chosen = tune(made.engine, made.layers, made.samples, modes=True)
    assert made.tried[: len(before) + 1] == [*before, last]
    assert AUTO_MODES.index(found) >= AUTO_MODES.index(level)
    assert made.layers.mode == found
    assert made.engine.choice is chosen
    assert chosen.peak_bytes <= usable_bytes
    assert made.engine.step(made.samples).tokens == sum(LENGTHS)


def test_sample_that_fits_at_no_level_is_rejected(made: Run) -> None:
    made.limit(made.peak_bytes("full") * 9 // 10)
    with pytest.raises(MemoryLimitError, match="a sample of 240 tokens needs"):
        tune(made.engine, made.layers, made.samples, modes=True)
    assert made.tried == list(AUTO_MODES)
    assert made.engine.choice is None


@pytest.mark.usefixtures("larger_is_faster")
def test_ample_memory_recomputes_nothing(made: Run) -> None:
    made.limit(2**30)
    found, chosen = tune(made.engine, made.layers, made.samples, modes=True)
    assert (found, made.tried, chosen.limited) == ("none", ["none"], False)


@pytest.mark.usefixtures("larger_is_faster")
def test_limited_memory_recomputes_for_larger_microbatches(made: Run) -> None:
    made.limit(made.peak_bytes("none", num_samples=2))
    found, _ = tune(made.engine, made.layers, made.samples, modes=True)
    assert (found, made.tried) == ("full", list(AUTO_MODES))
    none, selective, full = made.found
    assert none.limited
    assert selective.limited
    assert none.size < selective.size < full.size
