"""The order of an epoch and the windows cut from it: every sample once, and the same for the same arguments."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.lm.data.sampling_order import epoch_order, epoch_windows

LENGTHS = st.lists(st.integers(1, 50), max_size=60)
SEEDS = st.integers(0, 2**32 - 1)


@given(num_samples=st.integers(0, 200), seed=SEEDS, epoch=st.integers(0, 10))
def test_order_contains_every_sample_once(num_samples: int, seed: int, epoch: int) -> None:
    order = epoch_order(num_samples, seed=seed, epoch=epoch)
    assert sorted(order) == list(range(num_samples))
    assert order == epoch_order(num_samples, seed=seed, epoch=epoch)


def test_seeds_and_epochs_have_their_own_orders() -> None:
    orders = {tuple(epoch_order(50, seed=seed, epoch=epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_order_is_stable_between_versions() -> None:
    # A resumed run must find the order that it began with, on any machine.
    assert epoch_order(10, seed=0, epoch=0) == [9, 1, 6, 8, 0, 4, 3, 2, 7, 5]


@given(lengths=LENGTHS, global_batch=st.integers(1, 70), seed=SEEDS)
def test_sequence_windows_are_consecutive_chunks_of_order(lengths: list[int], global_batch: int, seed: int) -> None:
    windows = epoch_windows(lengths, global_batch=global_batch, global_batch_tokens=None, seed=seed, epoch=1)
    assert [index for window in windows for index in window] == epoch_order(len(lengths), seed=seed, epoch=1)
    assert all(len(window) == global_batch for window in windows[:-1])
    assert all(1 <= len(window) <= global_batch for window in windows)


@given(lengths=LENGTHS, target=st.integers(1, 300), seed=SEEDS)
def test_token_windows_close_nearest_to_target(lengths: list[int], target: int, seed: int) -> None:
    windows = epoch_windows(lengths, global_batch=None, global_batch_tokens=target, seed=seed, epoch=0)
    assert [index for window in windows for index in window] == epoch_order(len(lengths), seed=seed, epoch=0)
    for i, window in enumerate(windows):
        following = windows[i + 1][:1] if i + 1 < len(windows) else []
        sizes = [lengths[index] for index in [*window, *following]]
        distances = [abs(sum(sizes[:taken]) - target) for taken in range(1, len(sizes) + 1)]
        best = min(distances)
        assert window
        assert distances[len(window) - 1] == best
        assert distances.index(best) == len(window) - 1  # of two equally close, the earlier


def test_ties_close_early() -> None:
    windows = epoch_windows([2, 2, 2], global_batch=None, global_batch_tokens=3, seed=0, epoch=0)
    assert [len(window) for window in windows] == [1, 1, 1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((None, None), "Set exactly one of them."),
        ((4, 100), "global_batch=4 and global_batch_tokens=100: .* Set exactly one of them."),
        ((0, None), "global_batch is 0 and must be at least 1."),
        ((None, -5), "global_batch_tokens is -5 and must be at least 1."),
    ],
)
def test_batch_needs_exactly_one_size(sizes: tuple[int | None, int | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        epoch_windows([1], global_batch=sizes[0], global_batch_tokens=sizes[1], seed=0, epoch=0)


def test_numbers_out_of_range_are_rejected() -> None:
    with pytest.raises(ValueError, match="num_samples=-1 is negative"):
        epoch_order(-1, seed=0, epoch=0)
    with pytest.raises(ValueError, match="epoch=-1 is negative"):
        epoch_order(1, seed=0, epoch=-1)
    with pytest.raises(ValueError, match="the length of sample 0 is 0 and must be at least 1"):
        epoch_windows([0], global_batch=None, global_batch_tokens=4, seed=0, epoch=0)
