"""Seconds of one window and its update at every level of offload: measured micro-batches, predicted transfers.

micro-batches of some sizes, run before there is optimizer state → seconds of a size → + link and update → levels
"""

import time
from collections.abc import Sequence
from functools import partial

from bigbatch.autotune.probe import probe
from bigbatch.autotune.problem import TuningProblem
from bigbatch.autotune.search import sizes_between
from bigbatch.autotune.time_model import TimeModel
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory
from bigbatch.offload.cards import Card
from bigbatch.offload.costs import WEIGHT_MOVES, ModelState, WindowWork, update_time
from bigbatch.offload.levels import Offload

MAX_PROBING_S = 10.0
FASTER = 1.02  # a larger size that is not faster by this factor ends the measurement


def time_microbatches(problem: TuningProblem, largest: int, *, keeps_sums: bool) -> TimeModel | None:
    """Time micro-batches of doubling sizes, with all weights and without optimizer state on the device.

    Ends at ``largest``, at a size that does not fit or is not faster, or after ten seconds.

    Args:
        problem: The step; gradients are discarded, and everything is restored.
        largest: Largest size.
        keeps_sums: Whether the device holds gradient sums meanwhile.

    Returns:
        None if no size fits.
    """
    points: dict[int, float] = {}
    gradients = [(parameter, parameter.grad) for parameter in problem.parameters]
    size, started_s = problem.longest_sample, time.perf_counter()
    try:
        while True:
            rows = problem.worst_cases(size)[0]
            seconds = _seconds_of(problem, rows, keeps_sums=keeps_sums)
            if seconds is None:
                break
            last = min((each / of for of, each in points.items()), default=None)
            points[problem.size_of(rows)] = seconds
            is_faster = last is None or seconds / problem.size_of(rows) * FASTER < last
            if size >= largest or not is_faster or time.perf_counter() - started_s > MAX_PROBING_S:
                break
            size = min(2 * size, largest)
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    return TimeModel(tuple(sorted(points.items()))) if points else None


def _seconds_of(problem: TuningProblem, rows: Sequence[int], *, keeps_sums: bool) -> float | None:
    """Return the seconds of forward and backward; None if it does not fit."""
    take = partial(problem.batch.take, rows)
    try:
        return probe(problem.model, problem.parameters, problem.loss_fn, take, keeps_sums=keeps_sums).seconds
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    free_cached_memory()  # outside the except block, whose traceback references tensors
    return None


def window_seconds(
    problem: TuningProblem, timing: TimeModel, largest: int, *, state: ModelState, level: Offload, card: Card
) -> float:
    """Return the seconds of the batch and its update with the best size of micro-batches.

        min over sizes of Σ measured seconds of micro-batches + what the level saves and costs

    Args:
        problem: Its batch.
        timing: Measured, with weights and sums on the device.
        largest: Largest size that fits at this level.
        state: Training state.
        level: Of offload.
        card: Rates.
    """
    return min(
        _seconds_at(problem, timing, size, state=state, level=level, card=card)
        for size in sizes_between(problem.longest_sample, max(largest, problem.longest_sample))
    )


def _seconds_at(
    problem: TuningProblem, timing: TimeModel, size: int, *, state: ModelState, level: Offload, card: Card
) -> float:
    groups = problem.groups(size, timing.cost(size))
    measured_s = sum(timing.of(problem.size_of(rows)) for rows in groups)
    casts_s = len(groups) * WEIGHT_MOVES * state.num_trained / card.memory_rate  # `update_time` adds them by level
    work = WindowWork(
        tokens=1,
        num_microbatches=len(groups),
        layer_operations=0.0,
        layer_moves=0.0,
        head_operations=0.0,
        head_moves=max(0.0, measured_s - casts_s) * card.memory_rate,
    )
    return update_time(state, level, work, card).total_s
