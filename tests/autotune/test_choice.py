"""The largest size that fits, and what is chosen up to it, with the memory that is there given in bytes."""

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bigbatch import MemoryLimitError
from bigbatch.autotune import choice as choice_module
from bigbatch.autotune import probe
from bigbatch.autotune.choice import MicrobatchChoice, TuningProblem, choose
from bigbatch.autotune.peak_prediction import PeakPredictor, PredictionError
from bigbatch.autotune.search import largest_below
from bigbatch.batching.split import split
from bigbatch.memory.limit import describe_bytes
from bigbatch.memory.usage import MemoryBudget
from support.decoder_model import CPU, VOCABULARY, Decoder, adamw, collate, loss_fn, make, make_step, samples, tracked
from support.tiers import slow

thoroughly = settings(max_examples=300, deadline=None)
AMPLE = MemoryBudget.from_limit(2**33, "8GiB")


@pytest.fixture(autouse=True)
def _time_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks at the time."""
    monkeypatch.setattr(probe, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(choice_module, "MAX_PROBING_S", float("inf"))


# the search ---------------------------------------------------------------------------------------------------------


class Peaks:
    """A function of the size that counts how often it is asked, and refuses what is out of the range."""

    def __init__(self, function: Callable[[int], int], least: int, most: int) -> None:
        self.function, self.least, self.most = function, least, most
        self.asked: list[int] = []

    def __call__(self, size: int) -> int:
        assert self.least <= size <= self.most
        self.asked.append(size)
        return self.function(size)

    def largest_below(self, usable: int) -> int:
        """By brute force: the function must not fall."""
        low, high = self.least, self.most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.function(middle) <= usable else (low, middle - 1)
        return low


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    least = draw(st.sampled_from([1, 2, 7, 64, 2048]))
    return least, least * draw(st.integers(1, 5000))


LINES = st.lists(st.tuples(st.integers(-(10**9), 10**9), st.integers(0, 10**6)), min_size=1, max_size=4)


@st.composite
def convex(draw: st.DrawFn) -> tuple[Peaks, int]:
    """The larger of some lines and of what is held anyway; and a limit, often a tight one."""
    lines = [(draw(st.integers(0, 10**9)), 0), *draw(LINES)]
    peaks = Peaks(lambda size: max(start + slope * size for start, slope in lines), *draw(ranges()))
    least, most = peaks.function(peaks.least), peaks.function(peaks.most)
    share = draw(st.floats(0, 1)) ** draw(st.sampled_from([1, 8]))
    return peaks, least + int((most - least) * share)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Peaks, int]:
    """A function that stays the same for a while and then jumps, by anything."""
    jumps = draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=30))
    least, most = draw(ranges())
    width = max(1, (most - least) // len(jumps))
    peaks = Peaks(lambda size: sum(jumps[: 1 + (size - least) // width]), least, most)
    return peaks, draw(st.integers(jumps[0], sum(jumps)))


@thoroughly
@given(convex())
def test_largest_size_is_within_three_percent_of_optimum(case: tuple[Peaks, int]) -> None:
    peaks, usable = case
    found, best = largest_below(peaks, peaks.least, peaks.most, usable), peaks.largest_below(usable)
    assert peaks.function(found) <= usable
    assert len(peaks.asked) <= 14
    share = 0.97 if len(peaks.asked) < 14 else 0.5  # every third look at least halves the range, in its logarithm
    assert share * best - 1 <= found <= best


@thoroughly
@given(steps())
def test_chosen_size_fits_when_peak_jumps(case: tuple[Peaks, int]) -> None:
    peaks, usable = case
    found = largest_below(peaks, peaks.least, peaks.most, usable)
    assert peaks.function(found) <= usable
    assert len(peaks.asked) <= 14


@thoroughly
@given(st.integers(0, 10**9), st.integers(1, 10**6), st.integers(1, 50), st.integers(51, 10**6))
def test_largest_size_on_linear_peak_needs_few_steps(start: int, slope: int, best: int, most: int) -> None:
    peaks = Peaks(lambda size: start + slope * size, 1, most)
    for usable in (peaks.function(best), peaks.function(best + 1) - 1):
        peaks.asked.clear()
        assert largest_below(peaks, 1, most, usable) == best
        assert len(peaks.asked) <= 5


@pytest.mark.parametrize("best", [1, 2, 17, 101, 999])
def test_size_is_found_when_update_dominates_memory(best: int) -> None:
    """The peak is that of the update, for small sizes: the limit is near it everywhere."""
    peaks = Peaks(lambda size: max(10**9, 10**9 - 1000 * best + 1000 * size), 1, 1000)
    assert 0.97 * best - 1 <= largest_below(peaks, 1, 1000, 10**9 + 5) <= best


@pytest.mark.parametrize(("least", "most"), [(1, 1), (64, 64), (1, 2), (5, 1000)])
def test_minimum_size_is_found_when_only_it_fits(least: int, most: int) -> None:
    peaks = Peaks(lambda size: size, least, most)
    assert largest_below(peaks, least, most, least) == least
    assert len(peaks.asked) <= 6


def test_one_evaluation_is_enough_when_everything_fits() -> None:
    peaks = Peaks(lambda size: size, 1, 10**6)
    assert largest_below(peaks, 1, 10**6, 10**6) == 10**6
    assert peaks.asked == [10**6]


def test_sizes_out_of_memory_may_have_infinite_peak() -> None:
    peaks = Peaks(lambda size: size if size <= 700 else 2**60, 1, 10**6)
    assert 600 <= largest_below(lambda size: peaks(size) if size <= 700 else float("inf"), 1, 10**6, 10**6) <= 700


# the fullest micro-batches --------------------------------------------------------------------------------------------


def batch_of(lengths: list[int], *, uniform: bool) -> TuningProblem:
    if not uniform:
        return make_step([torch.ones(length) for length in lengths], model=nn.Linear(1, 1), by_length=True)
    model = nn.Linear(1, 1)
    parts = split(torch.ones(len(lengths), max(lengths)), 1, device=CPU)
    return TuningProblem(model, adamw(model), loss_fn, parts, lengths, uniform_length=True)


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@thoroughly
@given(LENGTHS, st.data())
def test_no_microbatch_exceeds_the_fullest_worst_case(lengths: list[int], data: st.DataObject) -> None:
    step = batch_of(lengths, uniform=False)
    size = data.draw(st.integers(step.longest_sample, len(lengths) * step.longest_sample))
    filled = step.usable_size(size)
    fullest = [step.size_of(rows) for rows in step.worst_cases(size)]
    assert max(map(step.size_of, step.groups(size))) <= filled <= size
    assert 0.99 * filled <= max(fullest) <= filled
    assert step.groups(size) == step.groups(filled)
    assert step.size_of(step.worst_cases(size)[0][:1]) == step.longest_sample, "the longest is among them"


@thoroughly
@given(LENGTHS, st.data())
def test_tensor_microbatches_never_exceed_rows_of_worst_case(lengths: list[int], data: st.DataObject) -> None:
    step = batch_of(lengths, uniform=True)
    size = data.draw(st.integers(step.longest_sample, len(lengths) * step.longest_sample))
    (rows,) = step.worst_cases(size)
    assert max(map(len, step.groups(size))) <= len(rows) <= len(lengths)
    assert step.peek(rows).shape == (len(rows), max(lengths))


def test_shorter_samples_that_fill_better_are_included() -> None:
    """Of 60 tokens only one fits into 119, and of 39, which few samples have, three."""
    step = batch_of([60] * 6 + [39] * 5, uniform=False)
    assert [step.size_of(rows) for rows in step.worst_cases(119)] == [60, 117]
    assert step.usable_size(119) == 117


def test_short_rows_of_padded_tensor_count_full_width() -> None:
    step = batch_of([60] * 6 + [1] * 5, uniform=True)
    assert len(step.worst_cases(60)[0]) == 5


def test_worst_case_without_lengths_repeats_heaviest_sample() -> None:
    step = make_step(samples(3, 4, 50, 5), model=nn.Linear(1, 1))
    assert step.worst_cases(3) == [[2, 2, 2]]
    assert step.peek(step.worst_cases(3)[0]).shape == (3, 50)


def test_tensor_rows_without_lengths_are_viewed_not_copied() -> None:
    batch = torch.ones(8, 5)
    step = make_step(batch, model=nn.Linear(1, 1))
    seen = step.peek(step.worst_cases(8)[0])
    assert (seen.data_ptr(), seen.shape) == (batch.data_ptr(), (8, 5))


# choosing -------------------------------------------------------------------------------------------------------------


def tokens(rows: int, length: int = 24) -> Tensor:
    return torch.stack(samples(*[length] * rows))


@cache
def peak(rows: int, length: int = 24, **kind: Any) -> int:
    """What rows of a length are predicted to take."""
    model = make(**kind)
    return PeakPredictor.from_training(model, adamw(model), loss_fn).predict(tokens(rows, length)).peak_bytes


def room_for(num_bytes: int) -> MemoryBudget:
    room = MemoryBudget.from_limit(-(-num_bytes * 100 // 95), "what is asked for")
    assert num_bytes <= room.usable_bytes <= num_bytes + 2
    return room


def measured(rows: list[Tensor] | Tensor, loss: Any = loss_fn, **kind: Any) -> int:
    """What a window of two micro-batches really takes, after the first."""
    from bigbatch import Engine

    model = make(**kind)
    optimizer = adamw(model)
    engine = Engine(model, optimizer, loss, microbatch=len(rows), collate=collate if isinstance(rows, list) else None)
    twice = [*rows, *rows] if isinstance(rows, list) else torch.cat([rows, rows])
    engine.step(twice)
    return tracked(model, optimizer, lambda: engine.step(twice)).peak_bytes


@pytest.mark.parametrize("best", [1, slow(2), slow(3), 7, slow(20)])
def test_prediction_finds_largest_sample_count_that_fits(best: int) -> None:
    choice = choose(make_step(tokens(32)), room_for(peak(best)))
    assert (choice.largest, choice.prediction_failure, choice.unit) == (best, None, "samples")
    assert choice.size <= best
    assert choice.peak_bytes <= peak(best)
    assert measured(tokens(best)) <= 1.01 * peak(best)


@pytest.mark.parametrize("best", [1, slow(2), slow(3), 7])
def test_prediction_finds_largest_token_count_that_fits(best: int) -> None:
    step = make_step(samples(*[24] * 8, *[5, 7, 11, 13] * 4), by_length=True)
    choice = choose(step, room_for(peak(best)))
    assert (choice.longest, choice.prediction_failure, choice.unit) == (24, None, "tokens")
    assert 24 * best <= choice.largest < 24 * (best + 1)
    assert choice.size <= choice.largest
    assert choice.peak_bytes <= room_for(peak(best)).usable_bytes


def test_choice_never_exceeds_whole_batch() -> None:
    choice = choose(make_step(tokens(6)), AMPLE)
    assert choice.largest == 6
    assert choice.size <= 6
    assert choice.limit_bytes == 2**33
    assert choice.peak_bytes == peak(choice.size)


@pytest.mark.parametrize("by_length", [True, False])
def test_one_sample_is_a_valid_batch(by_length: bool) -> None:
    choice = choose(make_step(samples(24), by_length=by_length), AMPLE)
    assert choice.size == choice.largest == choice.longest == (24 if by_length else 1)
    assert [tried.size for tried in choice.trials] == [choice.size]


def test_list_samples_without_lengths_count_as_heaviest() -> None:
    """The first micro-batches are of short samples, and the last one, of long ones, must fit."""
    batch = samples(*[2] * 12, *[48] * 4)
    choice = choose(make_step(batch), room_for(peak(3, 48)))
    assert choice.largest == 3
    assert measured(batch[-3:]) <= 1.01 * peak(3, 48)


def test_padded_tensors_with_lengths_count_full_width() -> None:
    lengths = [48] * 4 + [1] * 12
    padded = collate([*samples(*lengths)])
    model = make()
    step = TuningProblem(model, adamw(model), loss_fn, split(padded, 1, device=CPU), lengths, uniform_length=True)
    usable = peak(13, 48)
    choice = choose(step, room_for(usable))
    rows = max(map(len, step.groups(choice.largest)))
    assert measured(padded[:rows]) <= 1.01 * usable


def test_figures_of_choice_are_consistent() -> None:
    step = make_step(samples(*range(5, 37)), by_length=True)
    choice = choose(step, room_for(peak(20, 36)))
    assert [tried.size for tried in choice.trials] == sorted({tried.size for tried in choice.trials})
    assert choice.trials[0].size == 20, "the middle one of the lengths"
    assert choice.trials[-1].size <= choice.largest
    assert choice.size == step.usable_size(choice.size) <= choice.trials[-1].size
    assert all(tried.per_s > 0 for tried in choice.trials)
    assert choice.per_s > 0
    assert choice.microbatch.tokens == max(choice.size, 36)
    assert str(choice).startswith(f"at most {choice.size:,} tokens per micro-batch")
    assert f"peak {describe_bytes(choice.peak_bytes)} of {describe_bytes(choice.limit_bytes)}" in str(choice)


def test_choice_survives_a_round_trip_through_json() -> None:
    choice = choose(make_step(samples(*range(5, 37)), by_length=True), room_for(peak(20, 36)))
    assert MicrobatchChoice.from_dict(json.loads(json.dumps(asdict(choice)))) == choice


def test_empty_batch_has_no_choice() -> None:
    for step in (make_step(tokens(1)[:0]), make_step([]), make_step([], by_length=True)):
        with pytest.raises(ValueError, match="empty") as raised:
            choose(step, AMPLE)
        assert str(raised.value) == "the batch is empty: auto-tuning runs some of its samples."


MEANS = (
    "Shorten it, use activation checkpointing, a narrower dtype or fewer trained parameters, or raise the memory limit."
)


@pytest.mark.parametrize("by_length", [True, False])
def test_predicted_oversized_sample_is_rejected_with_its_needs(by_length: bool) -> None:
    ran: list[type] = []

    def watched(model: nn.Module, tokens: Tensor) -> Any:
        ran.append(type(tokens))
        return loss_fn(model, tokens)

    room = MemoryBudget.from_limit(400_000, "400000B", reserved_bytes=100_000)
    with pytest.raises(MemoryLimitError) as raised:
        choose(make_step(samples(24, 3), loss=watched, by_length=by_length), room)
    model = make()
    predicted = PeakPredictor.from_training(model, adamw(model), loss_fn).predict(tokens(1))
    parts = ", ".join(f"{name} {describe_bytes(part)}" for name, part in predicted.parts.items() if part)
    sample = "a sample of 24 tokens" if by_length else "one sample"
    assert str(raised.value) == (
        f"{sample} needs {describe_bytes(predicted.peak_bytes)} ({parts}), but memory is limited to 400000B, of which "
        f"278.3 KiB are usable for tensors. {MEANS}"
    )
    assert "parameters" in parts
    assert "optimizer" in parts
    assert Tensor not in ran


def selecting(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
    """Its shapes depend on the data: nothing can be predicted."""
    wanted = tokens > 0
    logits = model(tokens)[wanted]
    return F.cross_entropy(logits, tokens[wanted], reduction="sum"), len(logits)


def test_unpredictable_step_is_measured() -> None:
    batch = samples(*[24] * 12)
    usable = measured(batch[:5], selecting)
    choice = choose(make_step(batch, loss=selecting), room_for(usable))
    assert choice.prediction_failure is not None
    assert choice.prediction_failure.startswith("the step cannot run without data (aten.nonzero")
    assert 4 <= choice.largest <= 5
    assert choice.peak_bytes <= usable
    assert measured(batch[: choice.largest], selecting) <= 1.01 * usable


def test_unpredictable_step_counts_optimizer_update() -> None:
    """State and temporaries of the optimizer are no part of a micro-batch that is tried."""
    model = make(width=64)
    small = samples(2, 2)
    parameters = sum(p.numel() * 4 for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    choice = choose(make_step(small, model=model, optimizer=optimizer, loss=selecting), AMPLE)
    assert choice.prediction_failure is not None
    assert choice.peak_bytes > 5 * parameters
    with pytest.raises(MemoryLimitError):
        choose(make_step(small, model=model, optimizer=optimizer, loss=selecting), room_for(4 * parameters))


def test_measured_oversized_sample_is_rejected_with_its_peak() -> None:
    room = room_for(300_000)
    with pytest.raises(MemoryLimitError) as raised:
        choose(make_step(samples(24, 3), loss=selecting, by_length=True), room)
    text = str(raised.value)
    assert text.startswith("a sample of 24 tokens needs ")
    assert text.endswith(
        f" KiB, but memory is limited to what is asked for, of which 293.0 KiB are usable for tensors. {MEANS}"
    )


def failing_above(rows: int) -> Any:
    """Memory runs out for micro-batches of more rows: not for the prediction, which has no data."""

    def limited(model: nn.Module, tokens: Tensor) -> Any:
        if type(tokens) is Tensor and len(tokens) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")
        return loss_fn(model, tokens)

    return limited


def test_mispredicted_size_ends_search() -> None:
    choice = choose(make_step(tokens(32), loss=failing_above(1)), AMPLE)
    assert (choice.prediction_failure, choice.largest, choice.size) == (None, 1, 1)


@pytest.mark.parametrize(("fits", "largest"), [(11, 11), (10, 9), (8, 8), (31, 22)])
def test_size_below_mispredicted_one_is_tried(fits: int, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_second(run: Callable[[], None], _device: torch.device) -> float:
        run()
        return 1.0  # for a micro-batch of any size, so that each size is faster than the one before

    monkeypatch.setattr(probe, "_min_seconds", one_second)
    choice = choose(make_step(tokens(32), loss=failing_above(fits)), AMPLE)
    assert choice.prediction_failure is None
    assert choice.largest == largest == choice.trials[-1].size


def test_size_that_runs_out_when_tried_is_rejected() -> None:
    def limited(model: nn.Module, tokens: Tensor) -> Any:
        return selecting(model, tokens) if len(tokens) <= 5 else failing_above(5)(model, tokens)

    choice = choose(make_step(tokens(32), loss=limited), AMPLE)
    assert choice.prediction_failure is not None
    assert choice.largest == 5


@pytest.mark.parametrize("loss", [loss_fn, selecting])
def test_one_sample_out_of_memory_does_not_fit(loss: Any) -> None:
    def limited(model: nn.Module, tokens: Tensor) -> Any:
        return loss(model, tokens) if type(tokens) is not Tensor else failing_above(0)(model, tokens)

    with pytest.raises(MemoryLimitError) as raised:
        choose(make_step(tokens(32), loss=limited), AMPLE)
    assert str(raised.value).startswith("one sample does not fit")
    assert str(raised.value).endswith(
        f", but memory is limited to 8GiB, of which 7.6 GiB are usable for tensors. {MEANS}"
    )
    assert ("(parameters" in str(raised.value)) is (loss is loss_fn)


# steps that predictions get wrong -------------------------------------------------------------------------------------


class Skipping(Decoder):
    """Leaves layers out by chance; without data, a comparison with chance is always true."""

    def __init__(self) -> None:
        super().__init__(width=64)
        self.more = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(8))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.more:
            if torch.rand([]) < 1e-6:
                continue
            hidden = hidden + layer(hidden)
        return self.head(hidden)


def test_prediction_refuted_by_one_sample_is_discarded() -> None:
    choice = choose(make_step(tokens(8, 48), model=Skipping()), AMPLE)
    assert choice.prediction_failure is not None
    assert choice.prediction_failure.startswith("one sample was predicted to need ")
    assert " but needed " in choice.prediction_failure


def test_loss_that_runs_another_model_is_measured() -> None:
    model = make(norm=True)

    def closed(_: nn.Module, tokens: Tensor) -> Any:
        return loss_fn(model, tokens)

    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    choice = choose(make_step(tokens(8), model=model, loss=closed), AMPLE)
    assert choice.prediction_failure == (
        "loss_fn does not use the model that it is passed, or no parameter of it that is trained"
    )
    assert choice.peak_bytes >= 0.95 * peak(choice.size, norm=True)
    for name, buffer in model.named_buffers():
        assert type(buffer) is Tensor
        assert torch.equal(buffer, before[name])


def test_loop_that_waits_for_value_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from bigbatch.memory import allocation_tracker

    def waiting(model: nn.Module, tokens: Tensor) -> Any:
        left = torch.tensor([2, 3])
        while (left > 0).any():
            left = left - 1
        return loss_fn(model, tokens)

    monkeypatch.setattr(allocation_tracker, "MAX_READS", 100)
    assert choose(make_step(tokens(4), loss=waiting), AMPLE).prediction_failure == (
        "the step cannot run without data (more than 100 tensor values were read, perhaps in a loop that waits for one)"
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's, when it meets such a tensor
def test_cached_tensor_without_data_is_detected_and_reported() -> None:
    @lru_cache
    def weights(length: int) -> Tensor:
        return torch.ones(length)

    def cached(model: nn.Module, tokens: Tensor) -> Any:
        loss, items = loss_fn(model, tokens)
        return loss * weights(tokens.shape[1]).mean(), items

    with pytest.raises(PredictionError) as raised:
        choose(make_step(tokens(4), loss=cached), AMPLE)
    assert str(raised.value) == (
        "loss_fn caches tensors outside the model between calls, and has cached a fake tensor of the memory "
        "prediction. Store them in the model; or restart, and pass a number or a TokenBudget instead of "
        'microbatch="auto".'
    )


def test_cache_inside_model_is_accepted() -> None:
    class Cached(Decoder):
        weights: Tensor | None = None

        def forward(self, tokens: Tensor) -> Tensor:
            if self.weights is None:
                self.weights = torch.ones(VOCABULARY)
            return super().forward(tokens) * self.weights

    model = Cached()
    choice = choose(make_step(tokens(4), model=model), AMPLE)
    assert choice.prediction_failure is None
    assert model.weights is None


# optimizers -----------------------------------------------------------------------------------------------------------


class Keeping(torch.optim.SGD):
    """Has attributes of its own, which torch's way of copying optimizers leaves out."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seen = model, []
        super().__init__(model.parameters(), lr=0.1, momentum=0.9)

    def step(self, closure: Any = None) -> None:
        self.seen.append(len([p for p in self.model.parameters() if p.grad is not None]))
        super().step(closure)


def test_optimizer_with_custom_attributes_is_predicted() -> None:
    model = make()
    optimizer = Keeping(model)
    choice = choose(make_step(tokens(4), model=model, optimizer=optimizer), AMPLE)
    assert choice.prediction_failure is None
    assert not optimizer.seen
    assert not optimizer.state


def test_prediction_neither_counts_nor_runs_scheduler_step() -> None:
    model = make()
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    choice = choose(make_step(tokens(4), model=model, optimizer=optimizer), AMPLE)
    assert choice.prediction_failure is None
    assert not optimizer.state
    assert scheduler.last_epoch == 0
    with pytest.warns(UserWarning, match="lr_scheduler.step"):  # no step of the optimizer has been noticed
        scheduler.step()


OPTIMIZERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], bool]] = {
    "LBFGS": (lambda parameters: torch.optim.LBFGS(parameters, max_iter=1), False),
    "ASGD": (torch.optim.ASGD, True),
    "Rprop": (torch.optim.Rprop, True),
    "learning rate of a tensor": (lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(1e-3)), True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_optimizers_are_predicted_or_measured(name: str) -> None:
    make_optimizer, predicted = OPTIMIZERS[name]
    model = make()
    choice = choose(make_step(tokens(4), model=model, optimizer=make_optimizer(model.parameters())), AMPLE)
    assert (choice.prediction_failure is None) is predicted


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_gradients_are_measured() -> None:
    model = nn.EmbeddingBag(VOCABULARY, 8, sparse=True)
    step = make_step(
        tokens(8),
        model=model,
        optimizer=torch.optim.SparseAdam(model.parameters()),
        loss=lambda model, tokens: (model(tokens).square().sum(), len(tokens)),
    )
    choice = choose(step, AMPLE)
    assert choice.prediction_failure is not None
    assert "SparseAdam does not support dense gradients" in choice.prediction_failure
    assert choice.largest == 8


def test_parameters_outside_model_keep_their_gradients() -> None:
    model, scale = make(), nn.Parameter(torch.ones(()))
    scale.grad = torch.full((), 7.0)
    kept = scale.grad

    def scaled(model: nn.Module, tokens: Tensor) -> Any:
        loss, items = loss_fn(model, tokens)
        return loss * scale, items

    optimizer = torch.optim.AdamW([*model.parameters(), scale])
    choice = choose(make_step(tokens(4), model=model, optimizer=optimizer, loss=scaled), AMPLE)
    assert choice.prediction_failure is None
    assert scale.grad is kept
    assert (kept.item(), scale.item()) == (7.0, 1.0)


def test_random_state_after_collate_and_loss_is_restored() -> None:
    def drawing(model: nn.Module, tokens: Tensor) -> Any:
        random.random()
        torch.rand(3)
        return loss_fn(model, tokens)

    def draw(rows: Any) -> Tensor:
        random.random()
        return collate(rows) + torch.randint(1, (1,))

    model = make(dropout=0.5)
    parts = split(samples(5, 6, 7), 1, device=CPU, collate=draw)
    states = random.getstate(), torch.get_rng_state()
    choice = choose(TuningProblem(model, adamw(model), drawing, parts, [5, 6, 7]), AMPLE)
    assert choice.prediction_failure is None
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


# what an engine holds besides -----------------------------------------------------------------------------------------


def test_cuda_prediction_counts_prefetched_inputs() -> None:
    """Not only those that are computed with: while one micro-batch computes, the next is copied."""

    def predict(width: int, device: str) -> Any:
        model = nn.Linear(1, 1)
        images = torch.empty(4, width, 1, device="meta")
        rehearsal = PeakPredictor.from_training(
            model, adamw(model), lambda model, x: (model(x[:, :1]).sum(), len(x)), device=torch.device(device)
        )
        return rehearsal.predict(images)

    for device, copies in (("cpu", 1), ("cuda", 2)):
        narrow, wide = predict(128, device), predict(128 * 1025, device)
        images = 4 * 128 * 1024 * 4
        assert wide.peak_bytes - narrow.peak_bytes == copies * images, device
        assert wide.phases["update"] == narrow.phases["update"], "both are gone then"
        assert wide.forward_backward_bytes - narrow.forward_backward_bytes == images, device


def test_buffer_copies_are_counted() -> None:
    """The first micro-batch of a run keeps them, for when memory runs out."""

    def predict(*, buffers: int) -> Any:
        model = make()
        for i in range(buffers):
            model.register_buffer(f"mask_{i}", torch.zeros(1000))
        return PeakPredictor.from_training(model, adamw(model), loss_fn).predict(tokens(4))

    without, with_buffers = predict(buffers=0), predict(buffers=3)
    assert with_buffers.peak_bytes - without.peak_bytes == 2 * 3 * 4000
    assert with_buffers.forward_backward_bytes - without.forward_backward_bytes == 3 * 4000
    assert with_buffers.resident_bytes - without.resident_bytes == 3 * 4000


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_resident_running_and_update_memory_are_separate(device: str) -> None:
    model = make()
    rehearsal = PeakPredictor.from_training(model, adamw(model), loss_fn, device=torch.device(device))
    prediction = rehearsal.predict(tokens(4))
    parts = prediction.parts
    held = parts["parameters"] + parts["gradients"] + rehearsal.state_bytes + parts.get("libraries", 0)
    assert prediction.resident_bytes == held
    assert prediction.resident_bytes < prediction.forward_backward_bytes <= prediction.peak_bytes
    assert rehearsal.predict_update() == prediction.phases["update"]


def test_repeated_choices_predict_same_peaks() -> None:
    """What was predicted before changes nothing."""
    model = make(norm=True)
    step = make_step(tokens(8), model=model)
    choices: list[MicrobatchChoice] = [choose(step, room_for(peak(5, norm=True))) for _ in range(2)]
    assert [choice.largest for choice in choices] == [5, 5]
