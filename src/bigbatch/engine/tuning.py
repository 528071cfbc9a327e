"""Choose the micro-batch of an engine for a batch."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from bigbatch.accumulation.accumulator import Accumulator
from bigbatch.autotune.choice import MicrobatchChoice, TuningProblem, choose
from bigbatch.autotune.peak_prediction import prediction_obstacle
from bigbatch.batching.split import Split
from bigbatch.coupled.coupled import Coupled
from bigbatch.coupled.stand_in import stand_in
from bigbatch.distributed.collective import run_on_first_rank
from bigbatch.engine.batch_windows import BatchSplitter
from bigbatch.engine.checks import check_lengths
from bigbatch.engine.microbatch_size import MicrobatchSize
from bigbatch.engine.weight_probe import probe_weights
from bigbatch.execution.cuda_graphs import CudaGraphRunner
from bigbatch.execution.runner import MicrobatchRunner
from bigbatch.gradients.fused_gradients import FusedGradients
from bigbatch.gradients.sum_store import SumStore
from bigbatch.memory.usage import free_cached_memory, resolve_memory_budget
from bigbatch.offload.costs import BACKWARD_SHARE, link_bytes, sums_wait_s
from bigbatch.offload.link_rate import measure_link_rate
from bigbatch.types import Layout, LossFunction

LARGEST_COPIES = 0.25
"""Largest share of copied weights in the memory that micro-batches can use.

    time of a window ∝ (fixed + cast) / memory             without copies: fixed and cast are times of one micro-batch
                       fixed / (memory − copies)           with them: fewer tokens fit, and nothing is cast

so that copies pay up to a share of cast / (fixed + cast). By bytes, 6 and 14 for each weight: 0.3.
"""


def choose_microbatch(
    batch: Any,
    accumulator: Accumulator,
    runner: MicrobatchRunner,
    splitter: BatchSplitter,
    fused: FusedGradients,
    *,
    loss_fn: LossFunction,
    memory: str | int | None,
    layout: Layout,
) -> MicrobatchChoice:
    """Measure micro-batches of a batch between two windows on the first rank, and choose their size. Collective.

    Args:
        batch: As for `bigbatch.Engine.tune`.
        accumulator: Of the engine.
        runner: Of the engine; its memory is released.
        splitter: Of the engine.
        fused: Of the engine; its weights are not copied if micro-batches need the memory.
        loss_fn: As for `bigbatch.Engine`.
        memory: As for `bigbatch.Engine`.
        layout: As for `bigbatch.Engine`.

    Errors are those of `bigbatch.Engine.tune`.
    """

    link_rate = _rate_for_sums(accumulator)

    def measure() -> dict[str, Any]:
        parts = batch, accumulator, runner, splitter
        problem = _problem(*parts, loss_fn=loss_fn, layout=layout, waiting_s=_sums_wait(accumulator, link_rate))
        fused.copies.free()  # measured without them: they are added to what is measured
        budget = resolve_memory_budget(memory, accumulator.device, problem.resident_tensors())
        copies = fused.expected_copies_bytes
        fit = True  # without copies, also for modules whose parameters have no shape yet
        if copies:
            fit = copies_fit(copies, usable_bytes=budget.usable_bytes, static_bytes=problem.static_bytes())
        problem = replace(problem, copies_bytes=problem.copies_bytes + (copies if fit else 0))
        choice = choose(problem, budget)
        free_cached_memory()  # of micro-batches of other sizes: pieces of it are too small for the sums of a window
        return {"choice": asdict(choice), "copies_fit": fit}

    found = run_on_first_rank(accumulator.sync.ranks, measure)
    if not found["copies_fit"]:
        fused.copies.forbid("micro-batches need the memory")
    return MicrobatchChoice.from_dict(found["choice"])


def copies_fit(copies_bytes: int, *, usable_bytes: int, static_bytes: int) -> bool:
    """Return whether narrow copies of weights leave enough of the memory that micro-batches may use."""
    return copies_bytes <= LARGEST_COPIES * (usable_bytes - static_bytes)


def level_problem(
    batch: Any,
    accumulator: Accumulator,
    splitter: BatchSplitter,
    size: MicrobatchSize,
    loss_fn: LossFunction,
) -> TuningProblem:
    """Return the step of a batch before its level of offload is chosen, with the optimizers as they are.

    Args:
        batch: As for `bigbatch.Engine.step`.
        accumulator: Of the engine; nothing is created.
        splitter: Of the engine.
        size: Of micro-batches, in samples or tokens.
        loss_fn: As for `bigbatch.Engine`.

    Raises:
        ValueError: The number of lengths is not that of the samples.
    """
    samples, lengths = _samples(batch, splitter, counts_tokens=size.counts_tokens)
    return TuningProblem(
        accumulator.sync.module,
        accumulator.optimizer,
        _loss_of_microbatch(loss_fn, samples),
        samples,
        lengths,
        uniform_length=splitter.uniform_length,
        layout=size.layout,
    )


def _samples(batch: Any, splitter: BatchSplitter, *, counts_tokens: bool = True) -> tuple[Split, list[int] | None]:
    lengths = splitter.lengths_of(batch) if counts_tokens else None
    samples = splitter.samples(batch).copied()  # loss_fn may write to micro-batches, and runs again in windows
    if lengths is not None:
        check_lengths(lengths, samples.num_samples)
    return samples, lengths


def _loss_of_microbatch(loss_fn: LossFunction, samples: Split) -> LossFunction:
    return stand_in(loss_fn, samples.num_samples) if isinstance(loss_fn, Coupled) else loss_fn


def _problem(
    batch: Any,
    accumulator: Accumulator,
    runner: MicrobatchRunner,
    splitter: BatchSplitter,
    *,
    loss_fn: LossFunction,
    layout: Layout,
    waiting_s: Callable[[float], float],
) -> TuningProblem:
    module = accumulator.sync.module
    samples, lengths = _samples(batch, splitter)
    accumulator.prepare()
    probe_weights(accumulator, loss_fn, samples)
    runner.release()
    offload = accumulator.update.offload
    return TuningProblem(
        module,
        accumulator.optimizer if offload is None else offload.without_state(),
        _loss_of_microbatch(loss_fn, samples),
        samples,
        lengths,
        uniform_length=splitter.uniform_length,
        layout=layout,
        uses_cuda_graphs=isinstance(runner, CudaGraphRunner),
        prediction_obstacle=prediction_obstacle(module),
        copies_bytes=0 if offload is None else offload.window_bytes,
        keeps_sums=offload is None or offload.sums is None,
        waiting_s=waiting_s,
    )


def _sums_wait(accumulator: Accumulator, link_rate: float | None) -> Callable[[float], float]:
    """Return the seconds that a micro-batch of so many seconds waits for sums in host memory."""
    if link_rate is None:
        return lambda _: 0.0
    link = link_bytes(0, SumStore.bytes_of(accumulator.update.parameters()))
    rate = link_rate
    return lambda computed_s: sums_wait_s(link, rate, BACKWARD_SHARE * computed_s)


def _rate_for_sums(accumulator: Accumulator) -> float | None:
    """Measure the link on all ranks at once, and return the least rate; None without sums in host memory."""
    offload = accumulator.update.offload
    if offload is None or offload.sums is None:
        return None
    rates = accumulator.sync.ranks.all_gather(measure_link_rate(accumulator.device))
    return min((rate for rate in rates if rate is not None), default=None)
