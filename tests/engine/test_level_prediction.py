"""Predicted memory of the levels of offload against engines at these levels, and their seconds against hand counts."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigbatch.autotune.peak_prediction import CUDA_LIBRARIES_BYTES, PredictionError
from bigbatch.autotune.problem import TuningProblem
from bigbatch.autotune.time_model import TimeModel
from bigbatch.batching.split import split
from bigbatch.engine import card_target
from bigbatch.engine.card_target import CardTarget
from bigbatch.engine.level_cases import level_cases
from bigbatch.engine.level_prediction import LevelPrediction
from bigbatch.engine.level_times import time_microbatches, window_seconds
from bigbatch.memory.usage import MemoryBudget
from bigbatch.offload import costs
from bigbatch.offload.cards import card
from bigbatch.offload.level_choice import LevelLimits, choose_level
from bigbatch.offload.levels import LEVELS, Offload
from offload.models import CHUNK_BYTES, Decoder, decoder_loss, loss_fn, make, make_batch, make_model, make_tokens
from offload.models import small_chunks as small_chunks_of_engine
from offload.test_master_level import Cast, Penalized
from support.tiers import slow

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LINEAR = ["first.weight", "second.weight", "head.weight"]
H200 = card("h200")
HUGE = LevelLimits(2**60, 2**60)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let engines and predictions stream chunks of a few parameters."""
    monkeypatch.setattr(costs, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(costs, "SUM_SLOT_BYTES", CHUNK_BYTES)
    with small_chunks_of_engine():
        yield


def problem_of(
    model: nn.Module, batch: Any, loss: Any = decoder_loss, optimizer: torch.optim.Optimizer | None = None
) -> TuningProblem:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01)
    return TuningProblem(model, optimizer, loss, split(batch, 1, device=CPU), None, uniform_length=True)


def predict(
    model: nn.Module, batch: Any, loss: Any = decoder_loss, *, device: torch.device = CUDA, narrow: Any = LINEAR
) -> LevelPrediction:
    return LevelPrediction(problem_of(model, batch, loss), device, levels=LEVELS, narrow=narrow)


# memory ------------------------------------------------------------------------------------------------------------


def test_peaks_are_those_that_engines_predict(small_chunks: None) -> None:
    """With chunks as they are cut, of which `placement` knows the largest."""
    prediction = predict(Decoder(), make_tokens(0), device=CPU)
    for level in LEVELS:
        engine = make(level, microbatch="auto", memory="4GiB", noise=False)
        choice = engine.tune(make_tokens(0))
        found = prediction.peak_bytes(level, choice.size)
        assert abs(found - choice.peak_bytes) <= 2 * CHUNK_BYTES, level


def wide_stack(layers: int = 6, width: int = 2048) -> nn.Module:
    """Has 4 · 10⁶ weights in each layer and no memory."""
    return nn.Sequential(*[nn.Linear(width, width, bias=False, device="meta") for _ in range(layers)])


def stack_loss(model: nn.Module, inputs: Tensor) -> tuple[Tensor, int]:
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
        return model(inputs).float().square().sum(), len(inputs)


def test_peaks_on_cuda_are_those_by_hand() -> None:
    """AdamW: 16, 8, 6 and 2 bytes of a weight, buffers of the update, and of gradient sums."""
    model = wide_stack(24)
    weights = 24 * 2048**2
    names = [f"{index}.weight" for index in range(24)]
    prediction = predict(model, torch.zeros(4, 2048), stack_loss, narrow=names)
    assert prediction.narrow == names
    peaks = {level: prediction.peak_bytes(level, 1) - CUDA_LIBRARIES_BYTES for level in LEVELS}
    update = {level: prediction.needs(level).step_bytes for level in LEVELS}
    assert peaks["none"] >= 16 * weights
    assert 0 <= peaks["optimizer"] - 8 * weights - update["optimizer"] < 2**20
    assert 0 <= peaks["master"] - 6 * weights - update["master"] < 2**20
    # Before the first window, all weights are in float32 on the card.
    start = 4 * weights + 64 * 2**20
    window = 2 * weights + 2 * costs.NUM_SUM_SLOTS * costs.SUM_SLOT_BYTES
    assert peaks["gradients"] >= max(start, window)
    assert sorted(peaks.values(), reverse=True) == list(peaks.values())
    hosts = [prediction.needs(level).host_bytes for level in LEVELS]
    assert hosts == sorted(hosts)
    assert hosts[1] == pytest.approx(8 * weights, rel=1e-3)


def test_largest_size_fits_and_next_does_not() -> None:
    rows = torch.zeros(1, 2048).expand(65_536, 2048)
    prediction = predict(wide_stack(2), rows, stack_loss, narrow=["0.weight", "1.weight"])
    usable = prediction.peak_bytes("optimizer", 1)
    size = prediction.largest_size("optimizer", usable)
    assert 1 < size < len(rows)
    assert prediction.peak_bytes("optimizer", size) <= usable < prediction.peak_bytes("optimizer", size * 21 // 20 + 1)
    assert prediction.largest_size("none", 1) == 1  # nothing fits: the smallest


class Uncast(Decoder):
    """A layer runs outside of autocast, on inputs in the dtype of its weight."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.first(self.norm(self.embedding(tokens)))
        with torch.autocast(tokens.device.type, enabled=False):
            inner = self.second(hidden.to(self.second.weight.dtype))
        return self.head(inner)


@pytest.mark.parametrize("kind", [Decoder, Penalized, Cast, Uncast])
def test_narrow_weights_are_those_of_an_engine(kind: type[nn.Module]) -> None:
    engine = make("master", model=kind())
    engine.step(make_tokens(0))
    expected = [name for name, p in engine.model.named_parameters() if p.dtype is torch.bfloat16]
    prediction = predict(kind(), make_tokens(0), device=CPU)
    assert prediction.narrow == expected
    assert prediction.state.narrowed == sum(dict(engine.model.named_parameters())[n].numel() for n in expected)


def test_loss_without_autocast_has_no_level_master() -> None:
    prediction = predict(make_model(), make_batch(0), loss_fn, narrow=["0.weight", "3.weight", "5.weight"])
    assert prediction.levels == ["none", "optimizer", "gradients"]
    assert prediction.narrow == []


def test_prediction_leaves_no_trace() -> None:
    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    problem = problem_of(model, make_tokens(0), optimizer=optimizer)
    prediction = LevelPrediction(problem, CUDA, levels=LEVELS, narrow=LINEAR)
    for level in LEVELS:
        prediction.peak_bytes(level, 2)
    assert not optimizer.state
    assert all(p.grad is None and p.dtype is torch.float32 for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_state_that_exists_is_predicted_once() -> None:
    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    bare = LevelPrediction(problem_of(model, make_tokens(0), optimizer=optimizer), CPU, levels=LEVELS, narrow=LINEAR)
    decoder_loss(model, make_tokens(0))[0].backward()
    optimizer.step()
    model.zero_grad()
    held = LevelPrediction(problem_of(model, make_tokens(0), optimizer=optimizer), CPU, levels=LEVELS, narrow=LINEAR)
    assert held.state == bare.state
    assert [held.peak_bytes(level, 2) for level in LEVELS] == [bare.peak_bytes(level, 2) for level in LEVELS]


def test_loss_that_reads_values_into_shapes_is_refused() -> None:
    def loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        return model(tokens[tokens > 3][None]).sum(), 1

    with pytest.raises(PredictionError):
        predict(Decoder(), make_tokens(0), loss).peak_bytes("none", 1)


# seconds -----------------------------------------------------------------------------------------------------------


def test_seconds_are_measured_ones_and_those_of_the_update() -> None:
    """8 samples in micro-batches of 1, 2, 4 or 8, each 10 ms: the largest that fits, and the link of the update."""
    prediction = predict(wide_stack(), torch.zeros(8, 2048), stack_loss, narrow=[f"{i}.weight" for i in range(6)])
    timing = TimeModel(((1, 0.01), (8, 0.01)))
    state, problem = prediction.state, prediction.problem
    update_s = 32 * state.num_trained / H200.memory_rate
    given: dict[str, Any] = {"state": state, "card": H200}
    for size, num_microbatches in ((1, 8), (2, 4), (4, 2), (8, 1)):
        found = window_seconds(problem, timing, size, level="none", **given)
        assert found == pytest.approx(0.01 * num_microbatches + update_s, rel=1e-3)
    none, optimizer, master = (window_seconds(problem, timing, 8, level=level, **given) for level in LEVELS[:3])
    link_s = (8 * state.num_trained + 2 * costs.CHUNK_BYTES) / H200.link_rate  # and the first part in, the last out
    assert optimizer - none == pytest.approx(link_s - update_s, rel=1e-3)
    assert none < optimizer < master


def test_smaller_size_counts_if_it_is_faster() -> None:
    prediction = predict(wide_stack(1), torch.zeros(8, 2048), stack_loss, narrow=["0.weight"])
    timing = TimeModel(((1, 1.0), (2, 1.0), (8, 100.0)))
    found = window_seconds(prediction.problem, timing, 8, state=prediction.state, level="none", card=H200)
    assert found == pytest.approx(4.0, rel=0.01)


def test_microbatches_are_timed_without_a_trace() -> None:
    model = Decoder()
    problem = problem_of(model, make_tokens(0))
    kept = torch.ones_like(model.norm.weight)
    model.norm.weight.grad = kept
    timing = time_microbatches(problem, 8, keeps_sums=True)
    assert timing is not None
    sizes = [size for size, _ in timing.points]
    assert sizes[0] == 1
    assert set(sizes) <= {1, 2, 4, 8}
    assert model.norm.weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))


def test_size_that_does_not_fit_ends_the_timing() -> None:
    def loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return decoder_loss(model, tokens)

    model = Decoder()
    timing = time_microbatches(problem_of(model, make_tokens(0), loss), 8, keeps_sums=False)
    assert timing is not None
    assert {size for size, _ in timing.points} <= {1, 2}


def test_no_size_that_fits_has_no_time() -> None:
    def loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    assert time_microbatches(problem_of(Decoder(), make_tokens(0), loss), 8, keeps_sums=True) is None


# the card ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "total_gib", "expected"),
    [("NVIDIA H200", 140, "h200"), ("NVIDIA GeForce RTX 4090", 24, "rtx-4090"), ("Another GPU", 38, "a100-40gb")],
)
def test_card_has_its_rates_or_those_of_its_size(
    monkeypatch: pytest.MonkeyPatch, name: str, total_gib: int, expected: str
) -> None:
    properties = SimpleNamespace(total_memory=total_gib * 2**30)
    budget = MemoryBudget(1000, 950)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(card_target, "resolve_memory_budget", lambda memory, *_: budget if memory == "1000B" else None)
    monkeypatch.setattr(card_target, "available_host_bytes", lambda num_processes: 64 * num_processes)
    for link_rate in (None, 31e9):
        monkeypatch.setattr(card_target, "measure_link_rate", lambda _, rate=link_rate: rate)
        found = card_target.describe_card(CUDA, "1000B", [])
        assert found == CardTarget(CUDA, card(expected).with_link_rate(link_rate), LevelLimits(950, 64))
    assert found.card.link_rate == 31e9
    assert "link 31 GB/s in each direction (measured)" in str(found.card)
    assert card_target.is_card(CUDA)
    assert not card_target.is_card(CPU)


@pytest.mark.parametrize(("allocated", "usable"), [(0, 1000), (3 * 256, 1000 - 256), (10_000, 0)])
def test_memory_of_other_tensors_is_not_for_the_training(
    monkeypatch: pytest.MonkeyPatch, allocated: int, usable: int
) -> None:
    """Such as another model on the card; the training has 512 bytes of it."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: allocated)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(card_target, "resolve_memory_budget", lambda *_: MemoryBudget(1100, 1000))
    monkeypatch.setattr(card_target, "measure_link_rate", lambda _: None)
    monkeypatch.setattr(card_target, "bytes_on", lambda tensors, device: sum(t.nbytes for t in tensors))
    found = card_target.describe_card(CUDA, None, iter([torch.zeros(128)]))
    assert found.limits.card_bytes == usable


# levels of one batch -----------------------------------------------------------------------------------------------


def must_not_measure(*_: object, **__: object) -> TimeModel:
    raise AssertionError("no time decides here")


def stack_prediction(rows: int = 64) -> LevelPrediction:
    return predict(wide_stack(), torch.zeros(rows, 2048), stack_loss, narrow=[f"{i}.weight" for i in range(6)])


def test_fixed_microbatch_is_not_timed() -> None:
    prediction = stack_prediction()
    found = level_cases(prediction, CardTarget(CUDA, H200, HUGE), 4, must_not_measure)
    assert [case.level for case in found] == list(LEVELS)
    assert [case.card_bytes for case in found] == [prediction.peak_bytes(level, 4) for level in LEVELS]
    assert all(case.least_bytes == case.card_bytes and case.window_s is None for case in found)
    assert choose_level(found, HUGE).level == "none"


def test_batch_that_fits_whole_is_not_timed() -> None:
    found = level_cases(stack_prediction(), CardTarget(CUDA, H200, HUGE), None, must_not_measure)
    assert choose_level(found, HUGE).level == "none"


def test_single_level_that_fits_is_not_timed() -> None:
    prediction = stack_prediction()
    limits = LevelLimits(prediction.peak_bytes("none", 64), 0)
    found = level_cases(prediction, CardTarget(CUDA, H200, limits), None, must_not_measure)
    assert choose_level(found, limits).level == "none"


@pytest.mark.parametrize(
    ("seconds_of_one", "seconds_of_more", "expected"),
    [(1.0, 1.0, "optimizer"), slow(0.001, 65.536, "none")],
    ids=["each micro-batch takes as long", "a sample takes as long"],
)
def test_time_decides_whether_larger_microbatches_pay(
    monkeypatch: pytest.MonkeyPatch, seconds_of_one: float, seconds_of_more: float, expected: Offload
) -> None:
    """An eighth of the batch fits at none, more above it: link time against the overhead of each micro-batch."""
    monkeypatch.setattr(costs, "CHUNK_BYTES", 2**20)
    rows, names = torch.zeros(1, 256).expand(65_536, 256), [f"{index}.weight" for index in range(24)]
    prediction = predict(wide_stack(24, 256), rows, stack_loss, narrow=names)
    limits = LevelLimits(prediction.peak_bytes("none", 8192), 2**60)
    timing = TimeModel(((1, seconds_of_one), (65_536, seconds_of_more)))
    asked = []

    def measure(problem: TuningProblem, largest: int, *, keeps_sums: bool) -> TimeModel:
        asked.append((largest, keeps_sums))
        return timing

    found = level_cases(prediction, CardTarget(CUDA, H200, limits), None, measure)
    by_level = {case.level: case for case in found}
    assert all(limits.fits(by_level[level]) == (by_level[level].window_s is not None) for level in by_level)
    assert len(asked) == 1
    assert asked[0][1]
    assert choose_level(found, limits).level == expected


def test_device_without_room_for_sums_is_timed_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "CHUNK_BYTES", 2**20)
    names = [f"{index}.weight" for index in range(24)]
    prediction = predict(wide_stack(24), torch.zeros(1, 2048).expand(65_536, 2048), stack_loss, narrow=names)
    limits = LevelLimits(prediction.peak_bytes("master", 8), 2**60)
    asked = []

    def measure(problem: TuningProblem, largest: int, *, keeps_sums: bool) -> None:
        asked.append(keeps_sums)

    found = level_cases(prediction, CardTarget(CUDA, H200, limits), None, measure)
    assert [case.level for case in found if limits.fits(case)] == ["master", "gradients"]
    assert asked == [False]
    assert choose_level(found, limits).level == "master"  # without times


def test_integer_sums_have_eight_bytes() -> None:
    problem = problem_of(wide_stack(1), torch.zeros(1, 2048).expand(65_536, 2048), stack_loss)
    plain = LevelPrediction(problem, CUDA, levels=("none", "optimizer"), narrow=())
    wide = LevelPrediction(problem, CUDA, levels=("none", "optimizer"), narrow=(), integer_sums=True)
    assert wide.state.sum_bytes == 2 * plain.state.sum_bytes == 8 * 2048**2
    for level in ("none", "optimizer"):
        assert wide.peak_bytes(level, 65_536) == plain.peak_bytes(level, 65_536) + 4 * 2048**2


def test_frozen_weights_are_counted_apart() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    problem = problem_of(model, torch.zeros(4, 64), stack_loss, torch.optim.AdamW(trained))
    state = LevelPrediction(problem, CUDA, levels=LEVELS, narrow=["1.weight"]).state
    assert (state.frozen_bytes, state.weight_bytes, state.narrowed) == (4 * 4160, 4 * 4160, 4096)
    assert state.num_trained == 4160
    assert state.largest == 4096
