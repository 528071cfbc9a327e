"""Integer sums: exact for any order, scales that suit their windows, and the error they permit."""

import math
import random
from itertools import permutations
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from bigbatch.gradients import fixed_point_sums
from bigbatch.gradients.exact_totals import exact_sum
from bigbatch.gradients.fixed_point_sums import MOST_COLLECTED, MOST_ORDERS, SMALL, FixedPointSums
from bigbatch.gradients.gradient_scales import NUM_WINDOWS, GradientScales, Magnitudes

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
EXPONENTS = st.lists(st.one_of(st.none(), st.integers(-60, 60)), min_size=1, max_size=5).map(tuple)


@given(EXPONENTS, st.integers(1, 2**20))
def test_scales_of_a_window_suit_it(exponents: tuple[int | None, ...], num_quanta: int):
    magnitudes = Magnitudes(exponents, num_quanta)
    scales = magnitudes.scales()
    assert magnitudes.suit(scales)
    for exponent, scale in zip(exponents, scales, strict=True):
        if exponent is not None:
            assert num_quanta * 2.0 ** (exponent + scale) <= 2.0**62, "a sum cannot overflow"
            if num_quanta <= 2**13:
                assert num_quanta * 2.0**-scale <= 2.0 ** (exponent - 1 - 34), "its error is below 2**-34 of |g|"


@given(st.integers(-60, 60), st.integers(1, 2**12), st.integers(4, 60))
def test_scales_that_could_overflow_are_found(exponent: int, num_quanta: int, growth: int):
    scales = Magnitudes((exponent,), num_quanta).scales()
    assert not Magnitudes((exponent + growth,), num_quanta).suit(scales)


def test_gradients_eight_times_as_large_suit_and_more_do_not():
    scales = Magnitudes((0, 5), 16).scales()
    assert Magnitudes((3, 8), 16).suit(scales)
    assert not Magnitudes((4, 5), 16).suit(scales)
    assert Magnitudes((0, 5), 128).suit(scales)
    assert not Magnitudes((0, 5), 129).suit(scales)
    assert Magnitudes((-13, -8), 16).suit(scales), "10,000 times as small: still fine enough"
    assert not Magnitudes((-30, 5), 16).suit(scales)


def test_scales_follow_the_largest_of_recent_windows():
    scales = GradientScales()
    assert scales.scales(2) is None
    scales.note(Magnitudes((10, None), 4))
    for _ in range(NUM_WINDOWS):
        assert scales.scales(2) == Magnitudes((10, 2 if _ else None), 4).scales()
        scales.note(Magnitudes((1, 2), 4))
    assert scales.scales(2) == Magnitudes((1, 2), 4).scales()
    assert scales.scales(3) is None, "other parameters"
    copied = GradientScales()
    copied.load_state_dict(scales.state_dict())
    assert copied.scales(2) == scales.scales(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (70_000, 2)], ids=["small", "in chunks"])
def test_sum_is_the_same_integers_in_any_order(dtype: torch.dtype, shape: tuple[int, int]):
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator).to(dtype) * 10.0 ** (i % 5) for i in range(9)]
    peak = max(float(gradient.abs().max()) for gradient in gradients)
    scales = Magnitudes.from_peaks([peak], len(gradients)).scales()
    found = []
    for seed in range(3):
        order = random.Random(seed).sample(gradients, len(gradients))
        with FixedPointSums([parameter], scales=scales) as sums:
            for gradient in order:
                sums.backward((parameter * gradient).sum())
            assert sums.peaks() == [peak]
            (total,) = sums.tensors()
            assert total.dtype is torch.int64
            integers = total.clone()
            sums.to_float32(sums.peaks())
            found.append((integers, sums.tensors()[0].clone()))
    assert all(torch.equal(integers, found[0][0]) for integers, _ in found)
    exact = sum(gradient.double() for gradient in gradients)
    error = (found[0][0].double() * 2.0 ** -scales[0] - exact).abs().max()
    assert error <= exact.abs().max() * 2.0**-30
    assert torch.equal(found[0][1], (found[0][0].double() * 2.0 ** -scales[0]).float())


@DEVICES
@pytest.mark.parametrize("size", [3, 2 * SMALL], ids=["small", "large"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_non_finite_gradient_becomes_nan(device: str, size: int, value: float):
    parameters = [nn.Parameter(torch.ones(size, device=device)), nn.Parameter(torch.ones(2, device=device))]
    weights = torch.ones(size, device=device)
    weights[1] = value
    with FixedPointSums(parameters, scales=[40, 40]) as sums:
        for first in (torch.ones_like(weights), weights, torch.ones_like(weights)):
            sums.backward((parameters[0] * first).sum() + parameters[1].sum())
        found = sums.peaks()
        assert found == [pytest.approx(abs(value), nan_ok=True), 1.0]
        sums.to_float32(found)
        first, second = sums.tensors()
    assert first.isnan().all()
    assert torch.equal(second, torch.full_like(second, 3.0))


@DEVICES
@pytest.mark.parametrize("most", [MOST_COLLECTED, 10], ids=["at the end", "within the backward"])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16)])
def test_gradients_that_are_added_together_have_the_sums_of_single_ones(
    device: str, most: int, dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
):
    shapes = [(), (3,), (2, 5), (0,), (SMALL + 1,), (4, 1, 2), (7,)]
    parameters = [
        nn.Parameter(torch.zeros(shape, dtype=dtypes[index % len(dtypes)], device=device))
        for index, shape in enumerate(shapes)
    ]

    def collect() -> tuple[list[torch.Tensor], list[float]]:
        generator = torch.Generator().manual_seed(0)
        with FixedPointSums(parameters, scales=range(30, 30 + len(shapes))) as sums:
            for turn in range(4):
                used = [p for index, p in enumerate(parameters) if (index + turn) % 3]  # not the same ones each time
                terms = [(p * torch.randn(p.shape, generator=generator).to(p)).sum().float() for p in used]
                sums.backward(torch.stack(terms).sum())
            return [total.clone() for total in sums.tensors()], sums.peaks()

    monkeypatch.setattr(fixed_point_sums, "MOST_COLLECTED", most)
    adds = Mock(side_effect=torch.cat)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", adds)
        together, peaks = collect()
    assert adds.call_count == 4 if most == MOST_COLLECTED else adds.call_count > 4
    monkeypatch.setattr(fixed_point_sums, "SMALL", -1)
    single, expected = collect()
    assert peaks == expected
    assert peaks[3] == 0.0, "no element"
    assert all(map(torch.equal, together, single))
    assert len(together) == len(single) == len(shapes) - 1, "a parameter without elements has no sum"


def test_parts_of_one_gradient_are_all_added():
    weight, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))

    def layer(inputs: torch.Tensor) -> torch.Tensor:
        return inputs * weight

    with FixedPointSums([weight, other], scales=[20, 20]) as sums:
        for _ in range(2):
            hidden = checkpoint(layer, torch.ones(3, requires_grad=True), use_reentrant=True)
            hidden = checkpoint(layer, hidden, use_reentrant=True)  # the weight receives its gradient in two parts
            sums.backward(hidden.sum() + other.sum())
        first, second = sums.tensors()
        assert sums.peaks() == [1.0, 1.0]
    assert torch.equal(first, torch.full((3,), 4 * 2**20))
    assert torch.equal(second, torch.full((2,), 2 * 2**20))


def test_small_gradients_are_added_once_if_memory_runs_out_between_them(monkeypatch: pytest.MonkeyPatch):
    large, small, third = (nn.Parameter(torch.ones(size)) for size in (SMALL + 1, 3, 2))
    parameters = [large, small, third]
    with FixedPointSums(parameters, scales=[20, 20, 20]) as sums:
        sums.backward(sum(p.sum() for p in parameters))
        versions = sums.snapshot_versions()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "cat", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
            with pytest.raises(torch.OutOfMemoryError):
                sums.backward(sum(3 * p.sum() for p in parameters))
        only = sums.unchanged_since(versions)
        assert set(only) == {small, third}, "they were not added, the large one was"
        sums.backward(sum(3 * p.sum() for p in parameters), only=only)
        assert sums.peaks() == [3.0, 3.0, 3.0]
        assert all(torch.equal(total, torch.full_like(total, 4 * 2**20)) for total in sums.tensors())


def test_nan_stays_whatever_other_parameters_later_backwards_reach():
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(4)]
    with FixedPointSums(parameters, scales=[20] * 4) as sums:
        sums.backward((parameters[0] * math.nan).sum() + parameters[1].sum())
        for number in range(1, 40):  # more sets of parameters than are kept apart
            used = [p for index, p in enumerate(parameters) if (number >> index) & 1] or parameters
            sums.backward(sum((number * p).sum() for p in used))
        assert sums.peaks() == [pytest.approx(math.nan, nan_ok=True), 39.0, 39.0, 32.0]
        assert len(sums._peaks) <= MOST_ORDERS


def test_peaks_stay_when_the_order_of_all_parameters_comes_last():
    sums = FixedPointSums([nn.Parameter(torch.ones(2)) for _ in range(4)], scales=[20] * 4)
    orders = [order for order in permutations(range(4)) if order != (0, 1, 2, 3)][:MOST_ORDERS]
    for order, value in [*((order, 5.0) for order in orders), ((0, 1, 2, 3), 1.0)]:
        sums._added = [(index, torch.tensor(value)) for index in order]
        sums._note_peaks()
    assert sums.peaks() == [5.0] * 4


@DEVICES
@pytest.mark.parametrize("most", [2**24, 50_000], ids=["at once", "in chunks"])
def test_transposed_gradients_are_added_in_the_order_of_their_parameter(
    device: str, most: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fixed_point_sums, "DEVICE_CHUNK", most)
    monkeypatch.setattr(fixed_point_sums, "CPU_CHUNK", most)
    parameter = nn.Parameter(torch.zeros(300, 400, device=device).t())
    assert not parameter.is_contiguous()
    factors = torch.arange(120_000.0, device=device).view(400, 300)
    with FixedPointSums([parameter], scales=[10]) as sums:
        for count in (1, 2):
            sums.backward((parameter * factors).sum())
            (total,) = sums.tensors()
            assert torch.equal(total, (count * factors * 2**10).long())
            assert total.is_contiguous(), "as ranks reduce it"


@pytest.mark.parametrize("ends_by", ["close", "restart"])
def test_gradients_of_a_failed_backward_are_dropped_with_the_sums(ends_by: str):
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]

    def fail(_: torch.Tensor) -> None:
        raise ValueError("of the user")

    parameters[1].register_hook(fail)
    sums = FixedPointSums(parameters, scales=[20, 20])
    sums.open()
    with pytest.raises(ValueError, match="of the user"):
        sums.backward(parameters[0].sum() + parameters[1].sum())
    sums.close() if ends_by == "close" else sums.clear()
    assert not sums._small
    assert sums.peaks() == [0.0, 0.0]


def test_backwards_of_others_are_refused():
    with (
        FixedPointSums([nn.Parameter(torch.ones(3))], scales=[20]) as sums,
        pytest.raises(NotImplementedError, match=r"^reproducible sums take backwards by backward\(\) only$"),
        sums.adding(),
    ):
        pass


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_backward_waits_for_the_device():
    parameters = [nn.Parameter(torch.ones(size, device="cuda")) for size in (SMALL + 1, 3, 2)]
    before = torch.cuda.get_sync_debug_mode()
    with FixedPointSums(parameters, scales=[20, 20, 20]) as sums:
        try:
            torch.cuda.set_sync_debug_mode("error")
            for used in (parameters, parameters[1:], parameters):
                sums.backward(sum(p.sum() for p in used))
        finally:
            torch.cuda.set_sync_debug_mode(before)
        assert [int(total[0]) for total in sums.tensors()] == [2 * 2**20, 3 * 2**20, 3 * 2**20]


@given(st.lists(st.floats(-1e30, 1e30), max_size=20), st.randoms())
def test_loss_sum_does_not_depend_on_order(values: list[float], shuffler: random.Random):
    shuffled = values.copy()
    shuffler.shuffle(shuffled)
    assert exact_sum(shuffled) == exact_sum(values)


def test_sum_without_value_is_nan():
    assert math.isnan(exact_sum([math.inf, -math.inf]))
    assert math.isnan(exact_sum([1.0, math.nan]))
