"""The noise scale beside problems whose signal and noise are known, in float64."""

import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigbatch
from bigbatch.accumulation.noise_observer import NoiseObserver
from bigbatch.scaling import noise_scale
from bigbatch.scaling.noise_scale import MEASURE_FIRST, MIN_WINDOWS, NUM_MEASURED, NoiseScaleEstimator
from support.process_pool import Pool
from support.tiers import slow, slow_except

SIGNAL = torch.tensor([0.6, -0.3, 0.0, 0.2, 0.5], dtype=torch.float64)
DEVIATION = torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0], dtype=torch.float64)
WANTED = float(SIGNAL.square().sum()), float(DEVIATION.square().sum())
CUTS: dict[str, tuple[int, ...]] = {
    "equal": (8, 8, 8, 8, 8, 8),
    "variable": (1, 30, 4, 2, 20, 11),
    "one large and many small": (40, 1, 1, 1, 1, 1),
    "two": (3, 37),
}


class Line(nn.Module):
    """The gradient of an item is the item itself: of known mean and variance."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, items: Tensor) -> Tensor:
        return items @ self.weight


def items_of(count: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return SIGNAL + DEVIATION * noise


def windows_of(sizes: Sequence[int], count: int, *, sort: bool = False, seed: int = 0) -> list[list[Tensor]]:
    """Cut windows of items into micro-batches; sorted: the items themselves, by what has nothing to do with them."""
    generator = torch.Generator().manual_seed(seed)
    windows = []
    for _ in range(count):
        order = sorted(sizes, reverse=True) if sort else random.Random(len(windows)).sample(sizes, len(sizes))
        windows.append([items_of(size, generator) for size in order])
    return windows


def measured(windows: Sequence[Sequence[Tensor]]) -> list[tuple[float, float]]:
    """Give signal and noise of each window by itself, as hooks on real backwards found them."""
    model = Line()
    accumulator = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.0))
    found = []
    for microbatches in windows:
        accumulator.noise = NoiseObserver()
        window = accumulator.window()
        for items in microbatches:
            window.backward(model(items).sum(), items=len(items))
        window.step()
        sums = accumulator.noise.state_dict()
        found.append((sums["signal"] / sums["weight"], sums["noise"] / sums["weight"]))
    return found


def assert_unbiased(values: Sequence[float], wanted: float) -> None:
    mean = math.fsum(values) / len(values)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    assert abs(mean - wanted) <= 3 * error
    assert error <= 0.2 * wanted, "else three standard errors would say little"


@pytest.mark.parametrize("sort", [False, slow(True)], ids=["shuffled", "sorted"])
@pytest.mark.parametrize("name", CUTS)
def test_signal_and_noise_are_unbiased_for_every_cut(name: str, sort: bool) -> None:
    found = measured(windows_of(CUTS[name], 600, sort=sort, seed=len(name)))
    assert_unbiased([signal for signal, _ in found], WANTED[0])
    assert_unbiased([noise for _, noise in found], WANTED[1])


def test_assuming_equal_microbatches_biases_signal() -> None:
    sizes = CUTS["variable"]
    small, large = sum(sizes) / len(sizes), sum(sizes)
    wrong = []
    for microbatches in windows_of(sizes, 600):
        square_of_mean = float(torch.cat(microbatches).mean(0).square().sum())
        mean_of_squares = sum(float(items.mean(0).square().sum()) for items in microbatches) / len(sizes)
        wrong.append((large * square_of_mean - small * mean_of_squares) / (large - small))
    assert sum(wrong) / len(wrong) < 0.6 * WANTED[0]


def on_a_rank(sizes: Sequence[Sequence[int]], count: int) -> list[tuple[float, float]]:
    """Measure windows whose micro-batches are spread over ranks."""
    import torch.distributed as dist

    model = Line()
    accumulator = bigbatch.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.0), sync=bigbatch.Replicated(model)
    )
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        parts = [[items_of(size, generator) for size in of_rank] for of_rank in sizes]
        accumulator.noise = NoiseObserver()
        window = accumulator.window()
        for items in parts[dist.get_rank()]:
            window.backward(model(items).sum(), items=len(items))
        window.step()
        sums = accumulator.noise.state_dict()
        found.append((sums["signal"] / sums["weight"], sums["noise"] / sums["weight"]))
    return found


@pytest.mark.parametrize("sizes", [((8, 8), (8, 8)), ((1, 30), (2, 5, 11)), ((13,), (20,)), ((4, 9), ())])
def test_microbatches_of_all_ranks_count(pools: Callable[[int], Pool], sizes: tuple[tuple[int, ...], ...]) -> None:
    """As those of one process, whose signal and noise are unbiased for every cut."""
    one, other = pools(2).run(on_a_rank, sizes, 60)
    assert one == other
    generator = torch.Generator().manual_seed(1)
    whole = [[items_of(size, generator) for of_rank in sizes for size in of_rank] for _ in range(60)]
    for found, expected in zip(one, measured(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


class CountingObserver(NoiseObserver):
    """Counts the gradients that it sees; never forgets a window."""

    def __init__(self) -> None:
        super().__init__()
        self.estimator = NoiseScaleEstimator(half_life_items=1e18)
        self.num_gradients = 0

    def on_gradient(self, gradient: Tensor) -> None:
        self.num_gradients += 1
        super().on_gradient(gradient)


def measured_later(windows: Sequence[Sequence[Tensor]], **settings: Any) -> list[tuple[float, float]]:
    """Return signal and noise of each window after the first ones, of which some micro-batches are measured."""
    model = Line()
    if "sync" in settings:
        settings["sync"] = bigbatch.Replicated(model)
    accumulator = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.0), **settings)
    accumulator.noise = observer = CountingObserver()
    sums = [observer.state_dict()]
    for microbatches in windows:
        window = accumulator.window(microbatches)
        for items in window:
            window.backward(model(items).sum(), items=len(items))
        window.step()
        sums.append(observer.state_dict())
    first = sum(len(microbatches) for microbatches in windows[:MEASURE_FIRST])
    assert observer.num_gradients == first + NUM_MEASURED * (len(windows) - MEASURE_FIRST)
    names = ("weight", "signal", "noise")
    found = [[after[name] - before[name] for name in names] for before, after in pairwise(sums)]
    return [(signal / weight, noise / weight) for weight, signal, noise in found[MEASURE_FIRST:]]


def long_first(sizes: Sequence[int], count: int, *, seed: int) -> list[list[Tensor]]:
    """Return windows whose largest micro-batch is first and has nine times the variance of the last."""
    generator = torch.Generator().manual_seed(seed)
    deviations = torch.linspace(3, 1, len(sizes), dtype=torch.float64).tolist()
    ordered = list(zip(sorted(sizes, reverse=True), deviations, strict=True))
    return [[SIGNAL + (items_of(n, generator) - SIGNAL) * deviation for n, deviation in ordered] for _ in range(count)]


@pytest.mark.parametrize("name", slow_except(CUTS, "equal", "two"))
def test_some_microbatches_are_enough_without_bias(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_scale, "MEASURE_EVERY", 1)
    found = measured_later(windows_of(CUTS[name], 900, seed=len(name)))
    assert_unbiased([signal for signal, _ in found], WANTED[0])
    if name != "one large and many small":  # the noise of one window varies too much there
        assert_unbiased([noise for _, noise in found], WANTED[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["equal", "variable"])
def test_variance_may_depend_on_position(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_scale, "MEASURE_EVERY", 1)
    windows = long_first(CUTS[name], 2500, seed=3)
    assert_unbiased([signal for signal, _ in measured_later(windows)], WANTED[0])


def test_first_microbatch_alone_would_be_biased() -> None:
    wrong = []
    for microbatches in long_first(CUTS["equal"], 600, seed=3):
        first, total = microbatches[0], torch.cat(microbatches)
        per_item = float(first.sum(0).square().sum()) / len(first)
        wrong.append((float(total.sum(0).square().sum()) / len(total) - per_item) / (len(total) - len(first)))
    assert sum(wrong) / len(wrong) < 0.2 * WANTED[0]


@pytest.mark.parametrize("num_microbatches", range(10))
def test_every_position_is_measured_equally_often(num_microbatches: int) -> None:
    estimator, counts = NoiseScaleEstimator(), [0] * num_microbatches
    for _ in range(4000):
        positions = estimator.positions(num_microbatches)
        assert len(set(positions)) == min(NUM_MEASURED, num_microbatches)
        for position in positions:
            counts[position] += 1
        estimator.skip_window(1)
    for count in counts:
        assert count == pytest.approx(4000 * min(NUM_MEASURED, num_microbatches) / num_microbatches, rel=0.02)


def test_window_shorter_than_expected_is_not_measured() -> None:
    model = Line()
    accumulator = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.0))
    accumulator.noise = observer = CountingObserver()
    generator = torch.Generator().manual_seed(0)
    for size in [2] * (MEASURE_FIRST - 1) + [20, 2]:
        window = accumulator.window([items_of(5, generator) for _ in range(size)])
        for items in window:
            window.backward(model(items).sum(), items=5)
        window.step()
    state = observer.state_dict()
    assert (state["num_windows"], state["num_seen"], state["items_unmeasured"]) == (MEASURE_FIRST, 9, 10)
    assert observer.num_gradients == 2 * (MEASURE_FIRST - 1) + 20


def later_on_a_rank(sizes: Sequence[Sequence[int]], count: int) -> list[tuple[float, float]]:
    """Measure some micro-batches of windows that are spread over ranks."""
    import torch.distributed as dist

    generator = torch.Generator().manual_seed(1)
    every, noise_scale.MEASURE_EVERY = noise_scale.MEASURE_EVERY, 1
    try:
        parts = [[[items_of(size, generator) for size in of_rank] for of_rank in sizes] for _ in range(count)]
        return measured_later([of_ranks[dist.get_rank()] for of_ranks in parts], sync=None)
    finally:
        noise_scale.MEASURE_EVERY = every


@pytest.mark.slow
def test_some_microbatches_of_each_rank_are_enough(pools: Callable[[int], Pool]) -> None:
    one, other = pools(2).run(later_on_a_rank, ((8, 3, 5), (2, 5, 11, 6, 1)), 600)
    assert one == other
    assert_unbiased([signal for signal, _ in one], WANTED[0])
    assert_unbiased([noise for _, noise in one], WANTED[1])


@pytest.mark.slow
def test_interval_from_some_microbatches_has_its_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_scale, "MEASURE_EVERY", 1)
    covered = 0
    for seed in range(100):
        model = Line()
        accumulator = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.0))
        for microbatches in windows_of((30, 16, 12, 6), 60, seed=seed):
            window = accumulator.window(microbatches)
            for items in window:
                window.backward(model(items).sum(), items=len(items))
            found = window.step().noise
        assert found is not None
        covered += found.low_items <= WANTED[1] / WANTED[0] <= found.high_items
    assert 0.88 <= covered / 100 <= 1.0


def test_interval_has_its_nominal_coverage() -> None:
    covered = 0
    for seed in range(200):
        meter = NoiseScaleEstimator()
        for microbatches in windows_of((16, 16, 16, 16), 40, seed=seed):
            sums = [items.sum(0) for items in microbatches]
            total = torch.stack(sums).sum(0)
            squares = sum(float(part.square().sum()) for part in sums)
            meter.update(float(total.square().sum()) / 64**2, squares, 64, 4 * 16**2)
        found = meter.estimate()
        assert found is not None
        assert found.low_items <= found.scale_items <= found.high_items
        covered += found.low_items <= WANTED[1] / WANTED[0] <= found.high_items
    assert 0.88 <= covered / 200 <= 1.0


def test_no_estimate_is_made_before_some_windows() -> None:
    meter = NoiseScaleEstimator()
    for number in range(MIN_WINDOWS):
        assert meter.estimate() is None, number
        meter.update(1.0, 20.0, 10, 50)
    assert meter.estimate() is not None


def test_undetectable_signal_gives_infinite_scale() -> None:
    meter = NoiseScaleEstimator()
    for _ in range(MIN_WINDOWS):
        meter.update(0.5, 60.0, 10, 50)  # |A|² is 50, less than the squares
    found = meter.estimate()
    assert found is not None
    assert (found.scale_items, found.high_items) == (math.inf, math.inf)


def test_old_windows_decay_by_half_life_in_items() -> None:
    meter = NoiseScaleEstimator(half_life_items=100)
    for _ in range(200):
        meter.update(1.0, 90.0, 10, 50)
    for _ in range(10):  # a hundred items
        meter.update(3.0, 90.0, 10, 50)
    before, after = (100 - 90) / 50, (300 - 90) / 50
    assert meter.estimate().signal == pytest.approx((before + after) / 2)  # type: ignore[union-attr]


def test_later_windows_are_measured_one_in_eight() -> None:
    model = Line()
    accumulator = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.0))
    assert accumulator.noise is not None
    generator = torch.Generator().manual_seed(0)
    counts = []
    for _ in range(20):
        window = accumulator.window()
        for _ in range(2):
            window.backward(model(items_of(5, generator)).sum(), items=5)
        window.step()
        counts.append(accumulator.noise.state_dict()["num_windows"])
    assert counts == [1, 2, 3, 4, 5, 6, 7, 8, *[9] * 8, *[10] * 4]
    meter = NoiseScaleEstimator(half_life_items=10)
    meter.update(1.0, 90.0, 10, 50)
    meter.skip_window(10)
    meter.update(3.0, 90.0, 10, 50)
    assert meter.state_dict()["weight"] == pytest.approx(10 / 4 + 10)


def run(model: nn.Module, loss_fn: Callable[..., object], **settings: object) -> bigbatch.WindowReport:
    engine = bigbatch.Engine(model, torch.optim.SGD(model.parameters(), lr=0.0), loss_fn, microbatch=2, **settings)
    generator = torch.Generator().manual_seed(0)
    for _ in range(MIN_WINDOWS):
        report = engine.step(items_of(8, generator))
    return report


def test_engine_counts_in_samples() -> None:
    report = run(Line(), lambda model, items: (model(items).repeat(3).sum() / 3, 3 * len(items)))
    assert report.noise is not None
    assert report.noise.scale_samples == pytest.approx(report.noise.scale_items / 3)


def test_single_microbatch_gives_no_estimate() -> None:
    model = Line()
    engine = bigbatch.Engine(
        model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, x: (m(x).sum(), len(x)), microbatch=8
    )
    generator = torch.Generator().manual_seed(0)
    assert [engine.step(items_of(8, generator)).noise for _ in range(6)] == [None] * 6


def test_estimation_can_be_disabled() -> None:
    report = run(Line(), lambda model, items: (model(items).sum(), len(items)), noise=False)
    assert report.noise is None


def test_multi_term_loss_has_no_estimate() -> None:
    def loss_fn(model: nn.Module, items: Tensor) -> dict[str, tuple[Tensor, int]]:
        return {"a": (model(items).sum(), len(items)), "b": (model(items).square().sum(), len(items))}

    report = run(Line(), loss_fn, count_items=lambda items: {"a": len(items), "b": len(items)})
    assert report.noise is None


def test_window_split_after_oom_is_excluded() -> None:
    model = Line()
    failing = iter([False, True] + [False] * 100)

    def loss_fn(model: nn.Module, items: Tensor) -> tuple[Tensor, int]:
        if next(failing):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return model(items).sum(), len(items)

    engine = bigbatch.Engine(model, torch.optim.SGD(model.parameters(), lr=0.0), loss_fn, microbatch=2, check=False)
    generator = torch.Generator().manual_seed(0)
    counts = []
    for _ in range(3):
        engine.step(items_of(8, generator))
        assert engine.accumulator.noise is not None
        counts.append(engine.accumulator.noise.state_dict()["num_windows"])
    assert counts == [0, 1, 2]


def test_clipping_and_learning_rate_do_not_affect_it() -> None:
    def loss_fn(model: nn.Module, items: Tensor) -> tuple[Tensor, int]:
        return model(items).sum(), len(items)

    assert run(Line(), loss_fn).noise == run(Line(), loss_fn, max_grad_norm=0.01).noise


def test_estimate_resumes_from_saved_state() -> None:
    def loss_fn(model: nn.Module, items: Tensor) -> tuple[Tensor, int]:
        return model(items).sum(), len(items)

    def engine() -> bigbatch.Engine:
        model = Line()
        return bigbatch.Engine(model, torch.optim.SGD(model.parameters(), lr=0.0), loss_fn, microbatch=2)

    one, other = engine(), engine()
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        one.step(items_of(8, generator))
    other.load_state_dict(one.state_dict())
    batch = items_of(8, generator)
    assert other.step(batch).noise == one.step(batch).noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_weights_measure_same_within_precision(dtype: torch.dtype) -> None:
    def loss_fn(model: nn.Module, items: Tensor) -> tuple[Tensor, int]:
        return (model(items.to(dtype)).float()).sum(), len(items)

    wide = run(Line(), lambda model, items: (model(items).sum(), len(items))).noise
    narrow = run(Line().to(dtype), loss_fn).noise
    assert wide is not None
    assert narrow is not None
    assert narrow.noise == pytest.approx(wide.noise, rel=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.complex64, torch.complex128)])
def test_model_can_be_converted_between_windows(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, dtype=dtypes[0]))
    model = torch.nn.ParameterList([parameter])
    accumulator = bigbatch.Accumulator(model, torch.optim.SGD([parameter], lr=0.25))
    for dtype in (*dtypes, dtypes[0]):
        parameter.data = parameter.data.to(dtype)
        with accumulator.window() as window:
            for _ in range(2):
                window.backward(parameter.abs().square().sum(), items=1)
            report = window.step()
        assert report.skipped is None
    assert parameter.detach().abs().tolist() == pytest.approx([0.125] * 3)
