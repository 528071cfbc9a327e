"""Integer sums: exact for any order, scales that suit their windows, and the error they permit."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bigbatch.gradients.exact_totals import exact_sum
from bigbatch.gradients.fixed_point_sums import FixedPointSums
from bigbatch.gradients.gradient_scales import NUM_WINDOWS, GradientScales, Magnitudes

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


def test_non_finite_gradient_becomes_nan():
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    with FixedPointSums(parameters, scales=[40, 40]) as sums:
        sums.backward(parameters[0].sum() + parameters[1].sum())
        sums.backward((parameters[0] * torch.tensor([1.0, math.inf, 1.0])).sum())
        assert sums.peaks() == [math.inf, 1.0]
        sums.to_float32(sums.peaks())
        first, second = sums.tensors()
    assert first.isnan().all()
    assert torch.equal(second, torch.ones(2))


@given(st.lists(st.floats(-1e30, 1e30), max_size=20), st.randoms())
def test_loss_sum_does_not_depend_on_order(values: list[float], shuffler: random.Random):
    shuffled = values.copy()
    shuffler.shuffle(shuffled)
    assert exact_sum(shuffled) == exact_sum(values)


def test_sum_without_value_is_nan():
    assert math.isnan(exact_sum([math.inf, -math.inf]))
    assert math.isnan(exact_sum([1.0, math.nan]))
