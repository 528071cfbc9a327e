"""The order of an epoch and the windows cut from it: every sample once, and the same for the same arguments."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.lm.data import sampling_order
from bigbatch.lm.data.sampling_order import EpochOrder, epoch_order, epoch_windows
from support.tiers import slow

LENGTHS = st.lists(st.integers(1, 50), max_size=60)
ORDER_2 = [8, 2, 4, 3, 6, 7, 0, 1, 9, 5]  # of version 2, seed 0, epoch 0
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
    assert epoch_order(10, seed=0, epoch=0, version=1) == [9, 1, 6, 8, 0, 4, 3, 2, 7, 5]
    assert epoch_order(10, seed=0, epoch=0) == ORDER_2


@given(num_samples=st.integers(1, 300), seed=SEEDS, cut=st.tuples(st.integers(0, 300), st.integers(0, 300)))
def test_part_of_order_equals_whole(num_samples: int, seed: int, cut: tuple[int, int]) -> None:
    for version in (1, 2):
        order = EpochOrder(num_samples, seed=seed, epoch=3, version=version)
        assert len(order) == num_samples
        assert order.part(*cut).tolist() == order.part(0, num_samples).tolist()[cut[0] : cut[1]]


@pytest.mark.parametrize("num_samples", [2, slow(3), slow(5), 8, slow(24)])
def test_every_place_of_order_is_equally_likely(num_samples: int) -> None:
    counts = np.zeros((num_samples, num_samples))
    orders = 3000
    for seed in range(orders):
        counts[np.arange(num_samples), epoch_order(num_samples, seed=seed, epoch=0)] += 1
    expected = orders / num_samples
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    degrees = (num_samples - 1) ** 2
    assert chi_squared < degrees + 5 * np.sqrt(2 * degrees)


def test_large_order_is_a_permutation() -> None:
    order = EpochOrder(100_003, seed=7, epoch=1).part(0, 100_003)
    assert np.array_equal(np.sort(order), np.arange(100_003))
    assert abs(np.corrcoef(order, np.arange(100_003))[0, 1]) < 0.02
    # A part far into an enormous epoch needs no memory for the rest.
    far = EpochOrder(10**15, seed=7, epoch=1).part(10**15 - 5, 10**15)
    assert len(set(far.tolist())) == 5
    assert 0 <= far.min() < far.max() < 10**15


def test_windows_of_long_epochs_cross_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [1 + 7 * i % 13 for i in range(150)]
    whole = [
        epoch_windows(lengths, global_batch=None, global_batch_tokens=target, seed=0, epoch=0)
        for target in (1, 40, 5000)
    ]
    monkeypatch.setattr(sampling_order, "_CHUNK", 7)
    for target, windows in zip((1, 40, 5000), whole, strict=True):
        sizes = {"global_batch": None, "global_batch_tokens": target, "seed": 0, "epoch": 0}
        assert epoch_windows(lengths, **sizes) == windows  # type: ignore[arg-type]
        done = sum(map(len, windows[: len(windows) // 2]))
        assert epoch_windows(lengths, **sizes, position=done) == windows[len(windows) // 2 :]  # type: ignore[arg-type]


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
