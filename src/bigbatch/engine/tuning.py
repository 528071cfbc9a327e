"""Choose the micro-batch of an engine for a batch."""

from dataclasses import asdict
from typing import Any

from bigbatch.accumulation.accumulator import Accumulator
from bigbatch.autotune.choice import TuningProblem, choose
from bigbatch.autotune.peak_prediction import prediction_obstacle
from bigbatch.coupled.coupled import Coupled
from bigbatch.coupled.stand_in import stand_in
from bigbatch.engine.batch_windows import BatchSplitter
from bigbatch.engine.checks import check_lengths
from bigbatch.execution.cuda_graphs import CudaGraphRunner
from bigbatch.execution.runner import MicrobatchRunner
from bigbatch.memory.usage import resolve_memory_budget
from bigbatch.types import Layout, LossFunction


def choose_microbatch(
    batch: Any,
    accumulator: Accumulator,
    runner: MicrobatchRunner,
    splitter: BatchSplitter,
    *,
    loss_fn: LossFunction,
    memory: str | int | None,
    layout: Layout,
    uniform_length: bool,
) -> dict[str, Any]:
    """Measure micro-batches of a batch between two windows, and choose their size.

    Args:
        batch: As for `bigbatch.Engine.tune`.
        accumulator: Of the engine.
        runner: Of the engine; its memory is released.
        splitter: Of the engine.
        loss_fn: As for `bigbatch.Engine`.
        memory: As for `bigbatch.Engine`.
        layout: As for `bigbatch.Engine`.
        uniform_length: As for `TuningProblem`.

    Returns:
        The fields of a `MicrobatchChoice`.

    Errors are those of `bigbatch.Engine.tune`.
    """
    module = accumulator.sync.module
    lengths = splitter.lengths_of(batch)
    samples = splitter.samples(batch)
    if lengths is not None:
        check_lengths(lengths, samples.num_samples)
    accumulator.prepare()
    runner.release()
    problem = TuningProblem(
        module,
        accumulator.optimizer,
        stand_in(loss_fn, samples.num_samples) if isinstance(loss_fn, Coupled) else loss_fn,
        samples,
        lengths,
        uniform_length=uniform_length,
        layout=layout,
        uses_cuda_graphs=isinstance(runner, CudaGraphRunner),
        prediction_obstacle=prediction_obstacle(module),
    )
    return asdict(choose(problem, resolve_memory_budget(memory, accumulator.device, problem.resident_tensors())))
