"""The time of a micro-batch by its size: through the points, reasonable between and beyond them."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.autotune.time_model import MAX_OVERHEAD_TOKENS, TimeModel
from bigbatch.batching.plan import Cost

thoroughly = settings(max_examples=150, deadline=None)

SECONDS = st.floats(1e-6, 1e3)
SIZES = st.integers(1, 10**7)
TIMINGS = st.dictionaries(SIZES, SECONDS, min_size=1, max_size=8).map(
    lambda points: TimeModel(tuple(sorted(points.items())))
)


@st.composite
def rising(draw: st.DrawFn) -> TimeModel:
    """Timings in which a larger micro-batch took no less."""
    sizes = sorted(draw(st.sets(SIZES, min_size=1, max_size=8)))
    seconds = sorted(draw(st.lists(SECONDS, min_size=len(sizes), max_size=len(sizes))))
    return TimeModel(tuple(zip(sizes, seconds, strict=True)))


def line(*sizes: int, start_s: float = 0.25, token_s: float = 0.001) -> TimeModel:
    return TimeModel(tuple((size, start_s + token_s * size) for size in sizes))


def test_time_between_two_points_is_linear() -> None:
    timing = TimeModel(((100, 1.0), (200, 3.0), (400, 4.0)))
    assert [timing.of(size) for size in (100, 150, 200, 300, 400)] == [1.0, 2.0, 3.0, 3.5, 4.0]


@pytest.mark.parametrize("sizes", [(100, 200), (100, 200, 300), (50, 1000)])
@pytest.mark.parametrize("size", [1, 40, 99, 100, 170, 1001, 10**6])
def test_line_extends_below_and_above(sizes: tuple[int, ...], size: int) -> None:
    assert line(*sizes).of(size) == pytest.approx(0.25 + 0.001 * size)


def test_time_above_last_points_extends_their_line() -> None:
    assert TimeModel(((100, 1.0), (200, 3.0), (400, 4.0))).of(800) == pytest.approx(6.0)


def test_time_far_below_steep_line_stays_positive() -> None:
    timing = TimeModel(((100, 1.0), (200, 5.0)))
    assert timing.of(90) == pytest.approx(0.9), "the line would have 0.6"
    assert timing.of(1) == pytest.approx(0.01)


def test_single_point_scales_proportionally() -> None:
    timing = TimeModel(((100, 2.0),))
    assert [timing.of(size) for size in (1, 50, 100, 300)] == [0.02, 1.0, 2.0, 6.0]


def test_faster_larger_size_counts_only_at_its_size() -> None:
    timing = TimeModel(((100, 1.0), (200, 0.8)))
    assert [timing.of(size) for size in (100, 150, 200)] == pytest.approx([1.0, 0.9, 0.8])
    assert timing.of(400) == 0.8, "no time is gained by a line that falls"
    assert timing.of(50) == 1.0


@thoroughly
@given(TIMINGS)
def test_measured_times_are_reproduced(timing: TimeModel) -> None:
    for size, seconds in timing.points:
        assert math.isclose(timing.of(size), seconds, rel_tol=1e-9)


@thoroughly
@given(TIMINGS, SIZES)
def test_times_are_positive_and_finite(timing: TimeModel, size: int) -> None:
    assert 0 < timing.of(size) < math.inf


@thoroughly
@given(rising(), SIZES, SIZES)
def test_times_increase_with_size_where_points_do(timing: TimeModel, one: int, other: int) -> None:
    less, more = sorted((one, other))
    assert timing.of(less) <= timing.of(more) * (1 + 1e-9)


@thoroughly
@given(TIMINGS, SIZES)
def test_times_between_points_stay_within_them(timing: TimeModel, size: int) -> None:
    smaller = [point for point in timing.points if point[0] <= size]
    larger = [point for point in timing.points if point[0] >= size]
    if smaller and larger:
        least, most = sorted((smaller[-1][1], larger[0][1]))
        assert least * (1 - 1e-9) <= timing.of(size) <= most * (1 + 1e-9)


# what starting a micro-batch costs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 500, 10**6])
def test_overhead_tokens_equal_fixed_time_in_tokens(size: int) -> None:
    assert line(100, 200, 400).overhead_tokens(size) == 250


def test_overhead_tokens_use_token_time_at_size() -> None:
    """Up to 400 tokens a token takes 1 ms, from there on 3 ms."""
    timing = TimeModel((*line(100, 200, 400).points, (800, 0.65 + 3 * 0.4)))
    assert timing.overhead_tokens(300) == timing.overhead_tokens(100) == 250
    assert timing.overhead_tokens(800) < 250


def test_single_point_has_no_overhead() -> None:
    assert TimeModel(((100, 2.0),)).overhead_tokens(100) == 0


def test_proportional_times_have_no_overhead() -> None:
    assert TimeModel(((100, 1.0), (200, 2.0))).overhead_tokens(200) == 0
    assert TimeModel(((100, 1.0), (200, 5.0))).overhead_tokens(200) == 0, "and none that is negative"


@pytest.mark.parametrize("seconds", [1.0, 0.5, 1.0 + 1e-12])
def test_zero_token_time_gives_largest_overhead(seconds: float) -> None:
    assert TimeModel(((100, 1.0), (200, seconds))).overhead_tokens(200) == MAX_OVERHEAD_TOKENS


@thoroughly
@given(TIMINGS, SIZES)
def test_overhead_is_bounded_and_usable_by_plan(timing: TimeModel, size: int) -> None:
    tokens, cost, usual = timing.overhead_tokens(size), timing.cost(size), Cost()
    assert 0 <= tokens <= MAX_OVERHEAD_TOKENS
    assert (cost.per_microbatch, cost.per_token, cost.per_pair) == (
        tokens * usual.per_token,
        usual.per_token,
        usual.per_pair,
    )
