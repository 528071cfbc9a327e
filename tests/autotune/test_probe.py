"""Times of micro-batches do not depend on what other processes do."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bigbatch
from bigbatch.autotune import choice, probe

WORK = range(200_000)


def _spin() -> None:
    while True:
        sum(WORK)


@pytest.fixture
def _busy_machine() -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_spin, daemon=True) for _ in range(3 * len(os.sched_getaffinity(0)))]
    for process in processes:
        process.start()
    time.sleep(1.0)
    yield
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="the kernel has no schedstat of threads")
@pytest.mark.usefixtures("_busy_machine")
def test_waiting_for_a_cpu_is_no_time_of_a_micro_batch() -> None:
    clock_s, cpu_s = [], []

    def run() -> None:
        wall_s, thread_s = time.perf_counter(), time.thread_time()
        for _ in range(20):
            sum(WORK)
        clock_s.append(time.perf_counter() - wall_s)
        cpu_s.append(time.thread_time() - thread_s)

    measured_s = probe._min_seconds(run, torch.device("cpu"))
    assert min(cpu_s) * 0.9 < measured_s < min(cpu_s) * 1.3
    assert measured_s < min(clock_s) / 1.5  # it was disturbed in every repetition


def test_sleep_counts_and_a_kernel_without_statistics_gives_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    asleep_s = probe._min_seconds(lambda: time.sleep(0.02), torch.device("cpu"))
    assert probe._waited_s(torch.device("cuda")) == 0, "a GPU computes while the host waits"
    monkeypatch.setattr(probe, "_SCHEDULER_STATISTICS", Path("/nowhere"))
    without_s = probe._min_seconds(lambda: time.sleep(0.02), torch.device("cpu"))
    assert min(asleep_s, without_s) >= 0.02


@pytest.mark.parametrize(
    ("seconds_of", "timed", "expected"),
    [
        # Up to 4 samples each costs as much as the last; from 5 on all together do, as with kernels for many rows.
        (lambda size: 0.002 * min(size, 4), [1, 2, 4, 32, 64], 64),
        (lambda size: 0.002 * size, [1, 2, 4, 32], 1),
        (lambda size: 0.2 * min(size, 4), [1, 2, 4], 1),  # looking ahead would take too long
    ],
)
def test_size_far_above_is_timed_where_that_takes_no_time(
    monkeypatch: pytest.MonkeyPatch, seconds_of: Callable[[int], float], timed: list[int], expected: int
) -> None:
    def fake(model: object, parameters: object, loss_fn: object, take: Callable[[], Any], **_: object) -> probe.Probe:
        return probe.Probe(seconds_of(len(take())), 0)

    monkeypatch.setattr(choice, "probe", fake)
    model = torch.nn.Linear(4, 1)
    engine = bigbatch.Engine(
        model, torch.optim.SGD(model.parameters(), lr=0.1), lambda model, batch: (model(batch).sum(), len(batch)),
        microbatch="auto",
    )  # fmt: skip
    found = engine.tune(torch.randn(64, 4))
    assert [trial.size for trial in found.trials] == timed
    assert found.size == expected
