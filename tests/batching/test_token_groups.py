"""Sizes of packed rows, and which samples of a window run together."""

import random
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bigbatch.batching.plan import plan
from bigbatch.batching.token_groups import (
    MIN_ROW_STEP,
    SIZES_PER_DOUBLING,
    group_by_tokens,
    round_down_row,
    round_up_row,
)

TOKENS = st.one_of(st.integers(1, 5000), st.integers(1, 2**40))
LENGTHS = st.lists(st.integers(1, 900), max_size=60)
LAYOUTS = pytest.mark.parametrize("layout", ["padded", "packed"])


def laid_out(lengths: list[int], group: tuple[int, ...], layout: str) -> int:
    taken = [lengths[i] for i in group]
    return sum(taken) if layout == "packed" else len(taken) * max(taken)


# sizes -----------------------------------------------------------------------------------------------------------


@given(TOKENS)
@example(1)
@example(64)
@example(511)
@example(512)
@example(1023)
@example(2**40 - 1)
def test_rounded_size_pads_less_than_one_eighth(tokens: int) -> None:
    size = round_up_row(tokens)
    assert tokens <= size < tokens + max(MIN_ROW_STEP, tokens / SIZES_PER_DOUBLING + 1)
    assert size % MIN_ROW_STEP == 0


@given(TOKENS)
def test_rounded_size_is_its_own_fixed_point(tokens: int) -> None:
    size = round_up_row(tokens)
    assert round_up_row(size) == round_down_row(size) == size


@given(TOKENS)
@example(63)
@example(64)
@example(512)
def test_size_below_is_largest_not_greater(tokens: int) -> None:
    below = round_down_row(tokens)
    if tokens < MIN_ROW_STEP:
        assert below == tokens
        return
    assert below <= tokens < round_up_row(below + 1)
    assert below == round_up_row(below)
    assert tokens - below < max(MIN_ROW_STEP, tokens / SIZES_PER_DOUBLING)


@given(TOKENS, TOKENS)
def test_more_tokens_never_have_smaller_size(one: int, other: int) -> None:
    fewer, more = sorted((one, other))
    assert round_up_row(fewer) <= round_up_row(more)
    assert round_down_row(fewer) <= round_down_row(more)


def test_sizes_match_docstring_and_are_few() -> None:
    sizes = sorted({round_up_row(tokens) for tokens in range(1, 2**16 + 1)})
    assert sizes == sorted({round_down_row(tokens) for tokens in range(MIN_ROW_STEP, 2**16 + 1)})
    assert sizes[:9] == [64, 128, 192, 256, 320, 384, 448, 512, 576]
    assert [size for size in sizes if 1024 <= size <= 4608] == [
        *(1024, 1152, 1280, 1408, 1536, 1664, 1792, 1920),
        *(2048, 2304, 2560, 2816, 3072, 3328, 3584, 3840),
        *(4096, 4608),
    ]
    assert all(sum(size <= most < 2 * size for size in sizes) == SIZES_PER_DOUBLING for most in (1024, 5000, 2**16 - 1))


# groups ----------------------------------------------------------------------------------------------------------


@LAYOUTS
@given(lengths=LENGTHS, size=st.integers(1, 1200))
def test_groups_partition_samples_and_only_singles_exceed_size(layout: str, lengths: list[int], size: int) -> None:
    groups = group_by_tokens(lengths, size, layout=layout)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(groups)
    for group in groups:
        assert laid_out(lengths, group, layout) <= size or len(group) == 1


@LAYOUTS
@given(lengths=LENGTHS, size=st.integers(1, 1200))
def test_longer_samples_come_first_without_affecting_others(layout: str, lengths: list[int], size: int) -> None:
    groups = group_by_tokens(lengths, size, layout=layout)
    longer = [i for i, length in enumerate(lengths) if length > size]
    alone, others = groups[: len(longer)], groups[len(longer) :]
    assert alone == tuple((i,) for i in sorted(longer, key=lambda i: (-lengths[i], i)))
    kept = [i for i, length in enumerate(lengths) if length <= size]
    expected = group_by_tokens([lengths[i] for i in kept], size, layout=layout)
    assert others == tuple(tuple(kept[i] for i in group) for group in expected)


@LAYOUTS
@given(lengths=LENGTHS, size=st.integers(1, 1200), seed=st.integers(0, 9))
def test_grouping_does_not_depend_on_sample_order(layout: str, lengths: list[int], size: int, seed: int) -> None:
    groups = group_by_tokens(lengths, size, layout=layout)
    assert group_by_tokens(tuple(lengths), size, layout=layout) == groups
    shuffled = random.Random(seed).sample(lengths, len(lengths))
    again = group_by_tokens(shuffled, size, layout=layout)
    assert [[shuffled[i] for i in group] for group in again] == [[lengths[i] for i in group] for group in groups]


@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=60), size=st.integers(400, 1200))
def test_packed_groups_come_largest_first_and_are_few(lengths: list[int], size: int) -> None:
    groups = group_by_tokens(lengths, size, layout="packed")
    tokens = [laid_out(lengths, group, "packed") for group in groups]
    assert tokens == sorted(tokens, reverse=True)
    assert all(one + other > size for one, other in pairwise(tokens))  # none had fitted in
    assert groups == plan(lengths, token_budget=size, layout="packed").microbatches[0]


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=60), size=st.integers(400, 1200))
def test_packed_rows_are_no_more_than_padded_ones(lengths: list[int], size: int) -> None:
    packed, padded = (group_by_tokens(lengths, size, layout=layout) for layout in ("packed", "padded"))
    assert len(packed) <= len(padded)


def test_no_samples_give_no_groups() -> None:
    assert group_by_tokens([], 8, layout="packed") == group_by_tokens([], 8) == ()
