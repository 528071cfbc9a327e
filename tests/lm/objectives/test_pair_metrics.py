"""Metrics of the samples of a window, each counted once."""

import torch

from bigbatch.distributed.gradient_sync import GradientSync
from bigbatch.lm.data.pair_batches import NO_INDEX
from bigbatch.lm.objectives.pair_metrics import PairMetrics
from bigbatch.trials.trial import trial

SYNC = GradientSync(torch.nn.Linear(1, 1))


def record(metrics: PairMetrics, index: list[int], values: list[float]) -> None:
    metrics.record(torch.tensor(index), margin=torch.tensor(values))


def test_means_are_over_samples_and_not_microbatches() -> None:
    metrics = PairMetrics("margin")
    record(metrics, [0, 1, 2], [1.0, 2.0, 3.0])
    record(metrics, [3], [6.0])
    assert metrics.means(SYNC) == {"margin": 3.0}
    assert metrics.means(SYNC) == {}


def test_repeated_microbatch_replaces_its_values() -> None:
    metrics = PairMetrics("margin")
    record(metrics, [0, 1], [9.0, 9.0])
    record(metrics, [0], [1.0])
    record(metrics, [1], [2.0])
    assert metrics.means(SYNC) == {"margin": 1.5}


def test_padding_and_trials_do_not_count() -> None:
    metrics = PairMetrics("margin")
    record(metrics, [0], [1.0])
    record(metrics, [NO_INDEX], [9.0])
    with trial():
        record(metrics, [1], [9.0])
    record(metrics, [2], [9.0])
    metrics.discard_last()
    assert metrics.means(SYNC) == {"margin": 1.0}
