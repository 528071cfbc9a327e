"""The order of a run over its epochs: of one data set, and of sources mixed by weight."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.run_order import MixedOrder, UniformOrder
from bigbatch.lm.data.sampling_order import epoch_order
from bigbatch.lm.training.schedule import TrainingSchedule

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=25).map(lambda found: np.array(found, np.int32))
WEIGHTS = st.floats(0.1, 5)
MIXTURE = [1, 6, 5, 4, 7, 2, 0, 8, 3, 2]
SOURCES = st.lists(st.tuples(LENGTHS, WEIGHTS), min_size=1, max_size=4)


def mixed(sources: list[Any], seed: int = 0) -> MixedOrder:
    return MixedOrder([lengths for lengths, _ in sources], [weight for _, weight in sources], seed=seed)


def samples_of(order: Any, epochs: int) -> list[int]:
    parts = [order.epoch(epoch) for epoch in range(epochs)]
    return [sample for part in parts for sample in part.part(0, len(part)).tolist()]


def test_uniform_order_has_every_sample_in_each_epoch() -> None:
    order = UniformOrder(np.array([3, 4, 5], np.int32), seed=2)
    assert samples_of(order, 2) == [*epoch_order(3, seed=2, epoch=0), *epoch_order(3, seed=2, epoch=1)]
    assert order.locate(7) == (2, 1)
    assert (order.samples_before(2), order.tokens_before(2)) == (6, 24)
    assert UniformOrder(order.lengths, 2, 1).epoch(0).part(0, 3).tolist() == epoch_order(3, seed=2, epoch=0, version=1)


@settings(deadline=None)
@given(sources=SOURCES, seed=st.integers(0, 9))
def test_shares_are_kept_within_one_sample(sources: list[Any], seed: int) -> None:
    order = mixed(sources, seed)
    lengths = np.concatenate([lengths for lengths, _ in sources])
    owners = np.repeat(np.arange(len(sources)), [len(lengths) for lengths, _ in sources])
    weights = np.array([weight for _, weight in sources])
    longest = np.array([lengths.max() for lengths, _ in sources])
    tokens = np.zeros(len(sources))
    for sample in samples_of(order, 2)[:2000]:
        tokens[owners[sample]] += lengths[sample]
        times = tokens / weights  # equal if the shares were exact
        assert (times - times.min() <= longest / weights + 1e-6).all()


@pytest.mark.slow
@settings(deadline=None)
@given(sources=SOURCES, seed=st.integers(0, 9))
def test_epoch_is_one_pass_over_longest_source(sources: list[Any], seed: int) -> None:
    order = mixed(sources, seed)
    starts = np.cumsum([0, *(len(lengths) for lengths, _ in sources)])
    inside = range(starts[order.longest], starts[order.longest + 1])
    done = 0
    for epoch in range(3):
        part = order.epoch(epoch)
        samples = part.part(0, len(part)).tolist()
        assert sorted(sample for sample in samples if sample in inside) == list(inside)
        assert order.samples_before(epoch) == done
        assert order.locate(done) == (epoch, 0)
        assert order.locate(done + len(samples) - 1) == (epoch, len(samples) - 1)
        done += len(samples)
    lengths = np.concatenate([lengths for lengths, _ in sources])
    assert order.tokens_before(3) == int(lengths[samples_of(order, 3)].sum())
    assert order.passes()[order.longest] == pytest.approx(1)
    assert max(order.passes()) == pytest.approx(max(1.0, *order.passes()))


@settings(deadline=None)
@given(sources=SOURCES, seed=st.integers(0, 9))
def test_every_pass_of_source_has_each_sample_once(sources: list[Any], seed: int) -> None:
    order = mixed(sources, seed)
    starts = np.cumsum([0, *(len(lengths) for lengths, _ in sources)])
    found = samples_of(order, 3)
    for start, stop in pairwise(starts):
        own = [sample for sample in found if start <= sample < stop]
        size = int(stop - start)
        for first in range(0, len(own) - size + 1, size):
            assert sorted(own[first : first + size]) == list(range(start, stop))


def test_mixture_is_stable_between_versions() -> None:
    # A resumed run must find the order that it began with, on any machine.
    order = mixed([(np.full(6, 10, np.int32), 0.7), (np.full(3, 10, np.int32), 0.3)])
    assert samples_of(order, 1) == MIXTURE
    assert order.describe(["a", "b"]) == (
        "mixture: 70.0% of the tokens from a, 1.17 passes; 30.0% of the tokens from b, 1 pass; an epoch is one pass "
        "over b, 10 sequences"
    )


@pytest.mark.parametrize(
    "batch", [{"global_batch": 4}, {"global_batch_tokens": 60}, {"global_batch_schedule": "0:3 200:5"}]
)
def test_mixed_windows_resume_where_they_stopped(batch: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    lengths = [rng.integers(1, 30, number).astype(np.int32) for number in (40, 7)]
    config = TrainConfig(epochs=3, **batch).resolved()

    def schedule(**done: int) -> TrainingSchedule:
        order = MixedOrder(lengths, [0.6, 0.4], seed=1)
        return TrainingSchedule(config, np.concatenate(lengths), order=order, **done)

    whole = schedule()
    windows = list(whole.windows(0, 0))
    assert len(windows) == whole.total_steps
    assert [sample for window in windows for sample in window] == samples_of(MixedOrder(lengths, [0.6, 0.4], seed=1), 3)
    for done in (1, 5, len(windows) - 1):
        cursor = sum(map(len, windows[:done]))
        rest = schedule(step=done, cursor=cursor)
        assert rest.total_steps == whole.total_steps
        assert list(rest.windows(done, cursor)) == windows[done:]
        assert rest.batch_after(cursor) == whole.batch_after(cursor)
