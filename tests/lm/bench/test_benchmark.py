"""The comparison with what others would pick: the same update for everyone, checked, timed, and nothing left behind."""

import dataclasses
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bigbatch.errors import MemoryLimitError
from bigbatch.lm.bench import benchmark as race_module
from bigbatch.lm.bench.benchmark import BenchmarkResult, run_benchmark
from bigbatch.lm.bench.entries import OURS, SAMPLES, Entry, default_entries, missing, read_entry
from bigbatch.lm.bench.meter import (
    GradientMeter,
    Meter,
    NoMeter,
    Similarity,
    Timer,
    reference_gradient,
    similarity,
)
from bigbatch.lm.bench.peer import Peer, pad
from bigbatch.lm.bench.registry import make_contestant
from bigbatch.lm.bench.shared_model import SharedModel
from bigbatch.lm.bench.workload import W_1_5B, W_7B_LORA, W_SMALL, W, count_tokens, shift
from support.language_models import TINY_WORKLOAD
from support.tiers import slow, slow_except

SAME = 1 - 1e-6


@pytest.fixture
def stage() -> SharedModel:
    return SharedModel(TINY_WORKLOAD, None)


def run(*entries: str, rounds: int = 1, memory: str | None = None, said: list[str] | None = None) -> BenchmarkResult:
    def say(words: str, done: int = 0, total: int = 0) -> None:
        if said is not None:
            said.append(words)

    return run_benchmark(
        TINY_WORKLOAD, [read_entry(entry) for entry in entries], memory=memory, rounds=rounds, progress=say
    )


# the workload ----------------------------------------------------------------------------------------------------


def test_workload_is_that_of_published_figures() -> None:
    lengths = [len(sequence) for sequence in W.make_sequences()]
    assert (len(lengths), sum(lengths), min(lengths), max(lengths)) == (256, 92_493, 33, 2_048)
    assert sum(parameter.numel() for parameter in W.make_model("meta").parameters()) == 494_032_768


def test_large_workloads_have_sizes_of_their_names() -> None:
    sizes = {workload.name: workload.make_model("meta").num_parameters() for workload in (W_1_5B, W_7B_LORA)}
    assert sizes == {"w-1.5b": 1_543_714_304, "w-7b-lora": 7_615_616_512}
    assert count_tokens(W_1_5B.make_samples()) == 92_493
    assert count_tokens(W_7B_LORA.make_samples()) == 25_473


def test_weights_are_those_of_transformers_initialization() -> None:
    model = W_SMALL.make_model("cpu")
    layer = model.model.layers[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not layer.self_attn.q_proj.bias.any()
    assert (layer.input_layernorm.weight == 1).all()
    for matrix in (model.lm_head.weight.detach(), layer.mlp.gate_proj.weight.detach()):
        assert float(matrix.mean()) == pytest.approx(0, abs=1e-3)
        assert float(matrix.std()) == pytest.approx(model.config.initializer_range, rel=0.01)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_small_workload_matches_help() -> None:
    samples = W_SMALL.make_samples()
    assert (len(samples), count_tokens(samples)) == (32, 1_444)
    assert round(sum(parameter.numel() for parameter in W_SMALL.make_model("meta").parameters()) / 1e6) == 4


def test_model_and_batch_are_reproducible() -> None:
    one, other = (TINY_WORKLOAD.make_model("cpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    samples, again = TINY_WORKLOAD.make_samples(), TINY_WORKLOAD.make_samples()
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(samples, again, strict=True))


def test_shifted_labels_equal_those_of_transformers() -> None:
    (sample,) = shift([{"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([5, 6, 7])}])
    assert sample["labels"].tolist() == [6, 7, -100]


def test_entries_are_names_with_samples() -> None:
    assert [entry.name for entry in default_entries()] == list(SAMPLES)
    assert read_entry("trainer") == Entry("trainer", 1)
    assert read_entry(" trainer-expert:8") == Entry("trainer-expert", 8)
    assert read_entry(OURS) == Entry(OURS, None)


# the gradient ----------------------------------------------------------------------------------------------------


def test_similarity_is_cosine_and_norm_ratio() -> None:
    expected = [torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])]
    assert similarity([2 * t for t in expected], expected) == Similarity(1.0, 2.0)
    assert similarity([-t for t in expected], expected) == Similarity(-1.0, 1.0)
    assert similarity([torch.tensor([[3.0, 0.0]]), None], expected) == pytest.approx((0.6, 0.6))
    with pytest.raises(ValueError, match="zip"):
        similarity(expected[:1], expected)


def test_reference_is_gradient_of_whole_padded_batch(stage: SharedModel) -> None:
    reference = reference_gradient(stage)
    stage.model(**pad(stage.samples)).loss.backward()
    cosine, norm_ratio = similarity([parameter.grad for parameter in stage.parameters], reference)
    assert cosine > SAME
    assert norm_ratio == pytest.approx(1, abs=1e-5)


class Loop(Peer):
    """A loop that weighs its micro-batches as it is told, for a batch of ``stage.samples``."""

    def __init__(self, weight: Callable[[SharedModel, dict[str, Tensor]], float]) -> None:
        super().__init__(samples=2)
        self.weight = weight

    def update(self, stage: SharedModel, samples: Any, meter: Meter) -> None:
        meter.start()
        for batch in self.loader(stage, samples):
            (stage.model(**batch).loss * self.weight(stage, batch)).backward()
        stage.optimizer.step()
        meter.stop()


def mean_of_means(stage: SharedModel, batch: dict[str, Tensor]) -> float:
    return 2 / len(stage.samples)


def share_of_labels(stage: SharedModel, batch: dict[str, Tensor]) -> float:
    labels = count_tokens(stage.samples) - len(stage.samples)
    return int((batch["labels"][:, 1:] != -100).sum()) / labels


def found_of(stage: SharedModel, weight: Callable[[SharedModel, dict[str, Tensor]], float]) -> Similarity:
    meter = GradientMeter(stage, reference_gradient(stage))
    with stage.isolated():
        Loop(weight).turn(stage, meter)
    assert meter.similarity is not None
    return meter.similarity


def test_mean_of_means_gradient_is_detected(stage: SharedModel) -> None:
    assert found_of(stage, mean_of_means).cosine < 0.97
    assert found_of(stage, share_of_labels).cosine > SAME


def test_gradient_of_wrong_size_shows_in_norm_ratio(stage: SharedModel) -> None:
    cosine, norm_ratio = found_of(stage, lambda stage, batch: 3 * share_of_labels(stage, batch))
    assert cosine > SAME
    assert norm_ratio == pytest.approx(3, rel=1e-4)


def test_step_with_closure_is_measured_after_closure(stage: SharedModel) -> None:
    meter = GradientMeter(stage, reference_gradient(stage))
    meter.start()
    stage.optimizer.step(closure=lambda: stage.model(**pad(stage.samples)).loss.backward())
    meter.stop()
    assert meter.similarity is not None
    assert meter.similarity.cosine > SAME


def test_only_steps_between_start_and_stop_are_measured(stage: SharedModel) -> None:
    meter = GradientMeter(stage, reference_gradient(stage))
    meter.stop()
    stage.optimizer.step()
    assert meter.similarity is None


# the stage -------------------------------------------------------------------------------------------------------


def test_turn_restores_model(stage: SharedModel) -> None:
    model, code = stage.model, sys.modules[type(stage.model).__module__]
    expected = model(**pad(stage.samples)).logits
    rotary = code.apply_rotary_pos_emb
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with stage.isolated():
        model.forward = lambda **_: None
        model.register_forward_hook(lambda *_: None)
        model.model.layers[0].mlp.added = 1
        model.model.layers[1] = torch.nn.Identity()
        model.config.use_cache = False
        model.model.gradient_checkpointing = True
        code.apply_rotary_pos_emb = None
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert model.config.use_cache
    assert code.apply_rotary_pos_emb is rotary
    assert torch.equal(model(**pad(stage.samples)).logits, expected)


def test_every_turn_starts_from_same_state(stage: SharedModel) -> None:
    first = [parameter.detach().clone() for parameter in stage.parameters]
    for _ in range(2):
        with stage.isolated():
            assert all(torch.equal(a, b) for a, b in zip(stage.parameters, first, strict=True))
            assert all(parameter.grad is None for parameter in stage.parameters)
            states = [value for state in stage.optimizer.state.values() for value in state.values()]
            assert states
            assert not any(value.any() for value in states)
            stage.model(**pad(stage.samples)).loss.backward()
            stage.optimizer.step()
    assert not stage.optimizer.state


def test_reset_keeps_tensor_addresses(stage: SharedModel) -> None:
    with stage.isolated():
        tensors = [*stage.parameters, *(value for state in stage.optimizer.state.values() for value in state.values())]
        where = [tensor.data_ptr() for tensor in tensors]
        stage.reset()
        tensors = [*stage.parameters, *(value for state in stage.optimizer.state.values() for value in state.values())]
        assert [tensor.data_ptr() for tensor in tensors] == where


# the race --------------------------------------------------------------------------------------------------------


PEERS = [name for name in SAMPLES if not name.startswith((OURS, "torchtitan", "hand-written"))]


@pytest.mark.parametrize("name", slow_except(PEERS, "trainer", "accelerate"))
def test_every_peer_makes_one_whole_batch_update(name: str, stage: SharedModel) -> None:
    if reason := missing(name):
        pytest.skip(reason)
    reference = reference_gradient(stage)
    meter, timer = GradientMeter(stage, reference), Timer(stage.device)
    contestant = make_contestant(read_entry(f"{name}:4"))
    assert isinstance(contestant, Peer)
    with race_module._quiet(), stage.isolated():
        contestant.update(stage, stage.samples, meter)
        steps = {int(state["step"]) for state in stage.optimizer.state.values()}
    assert steps == {1}
    assert meter.similarity is not None
    means = name in ("accelerate", "lightning")
    assert (meter.similarity.cosine > SAME) != means
    with race_module._quiet(), stage.isolated():
        contestant.update(stage, stage.samples, timer)
    assert timer.elapsed_s is not None
    assert timer.elapsed_s > 0


@pytest.mark.parametrize("name", [OURS, "trainer", "hand-written"])
def test_first_update_is_timed_from_beginning_of_first_turn(name: str) -> None:
    said: list[str] = []
    (row,) = run(name, rounds=2, said=said).rows
    after_s = row.first_update_s
    assert after_s is not None
    assert after_s > 0
    told = [line for line in said if "first update" in line]
    assert len(told) == 1
    assert told[0].endswith(f"tokens/s, first update after {after_s:.1f} s")


def test_our_update_covers_whole_batch_every_round() -> None:
    (row,) = run(OURS, rounds=2, memory="3GiB").rows
    assert row.problem is None
    assert len(row.speeds) == 2
    assert row.tokens_per_s == pytest.approx(sum(row.speeds) / 2)
    assert row.similarity is not None
    assert row.similarity.cosine > SAME
    assert row.similarity.norm_ratio == pytest.approx(1, abs=1e-5)
    assert len(row.notes) == 1
    assert re.match(r"tuned once, in [\d.]+ s that are not counted: .* of (3\.0|2\.\d) GiB", row.notes[0])
    assert (row.peak_bytes is None) == (TINY_WORKLOAD.device == "cpu")


class Instant:
    """A contestant that takes the right update, or fails as it is told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.notes: list[str] = []
        self.first_update_s: float | None = None
        self.error = error

    def turn(self, stage: SharedModel, meter: Meter) -> None:
        if self.error is not None:
            raise self.error
        Loop(share_of_labels).update(stage, stage.samples, meter)


def contestants(monkeypatch: pytest.MonkeyPatch, **errors: Exception | None) -> None:
    monkeypatch.setattr(race_module, "missing", lambda name: None)
    monkeypatch.setattr(race_module, "make_contestant", lambda entry: Instant(errors.get(entry.name)))


def test_tools_alternate_and_failures_have_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    contestants(monkeypatch, trainer=torch.OutOfMemoryError("CUDA out of memory."), lightning=KeyError("x\ny"))
    said: list[str] = []
    found = run("trainer", "lightning", "accelerate:2", OURS, rounds=2, said=said)
    assert [row.problem for row in found.rows] == ["out of memory", "failed: KeyError: 'x\\ny'", None, None]
    assert [row.tokens_per_s is None for row in found.rows] == [True, True, False, False]
    assert [found.ratio(row) is None for row in found.rows] == [True, True, False, False]
    assert found.ratio(found.rows[-1]) == 1
    names = ("trainer:1", "lightning:1", "accelerate:2", OURS)
    assert said[-16::2] == [f"round {n} of 2: {name}" for n in (1, 2) for name in names]
    assert said[-15:-11:2] == ["trainer:1: out of memory", "lightning:1: failed: KeyError: 'x\\ny'"]
    assert all(
        re.fullmatch(rf"{name}: [\d,]+ tokens/s", line) for name, line in zip(names[2:], said[-3::2], strict=True)
    )


def test_our_oom_is_reported_and_other_errors_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    contestants(monkeypatch, bigbatch=MemoryLimitError("a single sample does not fit"))
    found = run(OURS, "trainer")
    assert found.ours is not None
    assert found.ours.problem == "out of memory"
    assert found.ratio(found.rows[1]) is None
    contestants(monkeypatch, bigbatch=KeyError("x"))
    with pytest.raises(KeyError):
        run(OURS)


def test_optimizer_that_never_steps_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    contestants(monkeypatch)
    monkeypatch.setattr(Instant, "turn", lambda self, stage, meter: None)
    assert run("trainer").rows[0].problem == "its optimizer took no step"


def test_missing_package_has_row_with_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("accelerate", "lightning", "pytorch_lightning", "torchtitan"):
        monkeypatch.setitem(sys.modules, module, None)
    found = run("trainer", "accelerate", "lightning", "torchtitan", "torchtitan-varlen")
    assert [row.problem for row in found.rows] == [
        'accelerate is not installed: pip install "bigbatch[bench]"',
        'accelerate is not installed: pip install "bigbatch[bench]"',
        'lightning is not installed: pip install "bigbatch[bench]"',
        "torchtitan is not installed: pip install torchtitan==0.2.2",
        "torchtitan is not installed: pip install torchtitan==0.2.2",
    ]


def test_warmup_does_not_change_starting_point(stage: SharedModel) -> None:
    class Weights(NoMeter):
        def start(self) -> None:
            self.found = [parameter.detach().clone() for parameter in stage.parameters]

    first, meter = [parameter.detach().clone() for parameter in stage.parameters], Weights()
    with stage.isolated():
        Loop(share_of_labels).turn(stage, meter)
    assert all(torch.equal(a, b) for a, b in zip(meter.found, first, strict=True))


# adapters over weights in bfloat16 --------------------------------------------------------------------------------

TINY_LORA = dataclasses.replace(TINY_WORKLOAD, name="w-lora", precision="bf16", lora_rank=2)


def test_adapter_reference_uses_and_restores_float32_base() -> None:
    stage = SharedModel(TINY_LORA, None)
    base = {name: p for name, p in stage.model.named_parameters() if not p.requires_grad}
    before = {name: (p.data_ptr(), p.dtype, p.clone()) for name, p in base.items()}
    reference = reference_gradient(stage)
    assert {tensor.dtype for tensor in reference} == {torch.float32}
    assert len(reference) == len(stage.parameters)
    assert all((p.data_ptr(), p.dtype) == before[name][:2] for name, p in base.items())
    assert all(torch.equal(p, before[name][2]) for name, p in base.items())
    assert {p.dtype for p in base.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", [OURS, "trainer", slow("trainer-checkpointing"), slow("trainer-expert")])
def test_every_tool_gives_adapters_whole_batch_gradient(name: str) -> None:
    if (why := missing(name)) is not None:
        pytest.skip(why)
    (row,) = run_benchmark(TINY_LORA, [read_entry(name)], memory=None, rounds=1, progress=lambda *_, **__: None).rows
    assert row.problem is None
    assert row.similarity is not None
    assert row.similarity.cosine > 0.999  # bfloat16
    assert row.similarity.norm_ratio == pytest.approx(1, abs=0.02)


def test_turn_can_rebuild_model_from_scratch(stage: SharedModel) -> None:
    with stage.isolated():
        layer = stage.model.model.layers[0]
        layer.forward = lambda *_, **__: None
        stage.model.mark = True
        stage.parameters[0].data.zero_()
        stage.restore_model()
        assert "forward" not in vars(layer)
        assert not hasattr(stage.model, "mark")
        assert stage.parameters[0].abs().sum() > 0
