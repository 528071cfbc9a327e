"""One update of a language model: with a load-balancing loss over the global batch, after counting the routing of it.

samples → micro-batches without gradient → routing of this rank → all-gather → `Engine.step` with the shares of experts
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from bigbatch.distributed.gradient_sync import never
from bigbatch.engine.engine import Engine
from bigbatch.errors import MemoryLimitError, RankFailedError, ShardedMemoryError, WindowAbandonedError, first_line
from bigbatch.lm.model.load_balancing import CROSS_ENTROPY, LOAD_BALANCING, LoadBalancedLoss, Routing
from bigbatch.lm.model.setup import ModelSetup
from bigbatch.lm.training.callbacks import MetricsRow
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory
from bigbatch.rng import random_states, set_random_states
from bigbatch.window_report import WindowReport

_FINISHED, _ABANDONED, _FAILED = 0.0, 1.0, 2.0
Samples = Sequence[dict[str, Tensor]]


def run_update(
    engine: Engine,
    model_setup: ModelSetup,
    samples: Samples,
    *,
    should_abandon: Callable[[], bool] = never,
    should_stop: Callable[[], bool] = never,
) -> tuple[WindowReport, MetricsRow]:
    """Run `Engine.step` with the loss of a model, and return its report and the metrics of its load-balancing loss.

    With a load-balancing loss over the global batch, every sample runs forward once more before, without gradient, in
    micro-batches of the same size; ``elapsed_s`` includes that. Collective.

    Args:
        engine: Of the model.
        model_setup: The model and its loss.
        samples: Of this rank.
        should_abandon: As for `Engine.step`; also called before each of the micro-batches without gradient.
        should_stop: As for `Engine.step`.

    Returns:
        The report; and ``loss``, the cross entropy alone, with ``router_aux_loss``, the load-balancing loss without its
        coefficient, over all ranks: empty for a model without that loss. For another objective than sft, its metrics.

    Raises:
        As `Engine.step`.
    """
    balanced, metrics = model_setup.balanced, model_setup.metrics
    if metrics is not None:
        metrics.clear()
        report = engine.step(samples, should_abandon=should_abandon, should_stop=should_stop)
        return report, dict(metrics.means(engine.sync))
    if balanced is None:
        return engine.step(samples, should_abandon=should_abandon, should_stop=should_stop), {}
    if balanced.scope == "microbatch":
        report = engine.step(samples, should_abandon=should_abandon, should_stop=should_stop)
        terms = report.terms
        return report, {
            "loss": terms[CROSS_ENTROPY].loss,
            "router_aux_loss": terms[LOAD_BALANCING].loss / balanced.coefficient,
        }
    started_s = time.perf_counter()
    with counted_window(engine, model_setup, samples, should_abandon=should_abandon) as routing:
        counted_s = time.perf_counter() - started_s
        report = engine.step(samples, should_abandon=should_abandon, should_stop=should_stop)
        balancing = float(routing.loss)  # waits for the device, as the report of the loss does
    report = replace(report, elapsed_s=report.elapsed_s + counted_s)
    return report, {"loss": report.loss - balanced.coefficient * balancing, "router_aux_loss": balancing}


@contextmanager
def counted_window(
    engine: Engine, model_setup: ModelSetup, samples: Samples, *, should_abandon: Callable[[], bool] = never
) -> Iterator[Routing]:
    """Count the routing of a window over all ranks, and use it for the losses of the block. Collective.

    Random states and buffers are restored: the micro-batches of the block draw the same random numbers.

    Args:
        engine: Cuts the samples, and knows the other ranks.
        model_setup: With a load-balancing loss.
        samples: Of this rank.
        should_abandon: Called before each micro-batch: whether to drop the window.

    Yields:
        The routing of the window.

    Raises:
        MemoryLimitError: A single sample does not fit in memory.
        RankFailedError: Another rank raised an error.
        WindowAbandonedError: A rank abandoned the window.
    """
    balanced, sync = model_setup.balanced, engine.sync
    assert balanced is not None, "checked by the caller"
    device = engine.accumulator.device
    own = balanced.no_routing(device)
    error: BaseException | None = None
    try:
        if sync.runs_in_lockstep:
            own = _lockstep_routing(engine, model_setup, balanced, samples)
        else:
            own = _routing(engine, model_setup, balanced, samples, should_abandon)
    except BaseException as raised:  # noqa: BLE001 - the other ranks wait for the counts; raised below
        error = raised
    if sync.size == 1:
        if error is not None:
            raise error
        total = own
    else:
        total = _over_ranks(engine, own, error)
    with balanced.window(total):
        yield total


@contextmanager
def counted_samples(model_setup: ModelSetup, samples: Samples, device: torch.device) -> Iterator[None]:
    """Count the routing of a batch of one process, a sample at a time, and use it for the losses of the block.

    Random states and buffers are restored. No-op for a model without load-balancing loss over the global batch.

    Args:
        model_setup: The model and its loss.
        samples: The whole batch.
        device: Of the model.
    """
    balanced = model_setup.balanced
    if balanced is None or balanced.scope == "microbatch":
        yield
        return
    total = balanced.no_routing(device)
    with _restored_state(model_setup.model, device):
        for sample in samples:
            total += balanced.routing(model_setup.model, _collated(model_setup, [sample], device))
    with balanced.window(total):
        yield


def _over_ranks(engine: Engine, own: Routing, error: BaseException | None) -> Routing:
    """Add up the counts of all ranks; if one failed, raise on all of them. Collective."""
    status = _FINISHED if error is None else _ABANDONED if isinstance(error, WindowAbandonedError) else _FAILED
    rows = engine.sync.all_gather([status, *own.numbers()])
    if error is not None:
        raise error
    statuses = [row[0] for row in rows]
    if _FAILED in statuses:
        raise RankFailedError(
            f"rank {statuses.index(_FAILED)} failed before update {engine.accumulator.update.num_steps + 1}, while it "
            "counted the tokens of each expert: see its message."
        )
    if _ABANDONED in statuses:
        raise WindowAbandonedError(f"the window was abandoned by rank {statuses.index(_ABANDONED)}.")
    return Routing.from_numbers([sum(column) for column in list(zip(*rows, strict=True))[1:]], own.hits.device)


def _routing(
    engine: Engine,
    model_setup: ModelSetup,
    balanced: LoadBalancedLoss,
    samples: Samples,
    should_abandon: Callable[[], bool],
) -> Routing:
    """Count the routing of this rank's samples; a micro-batch that does not fit in memory is run in halves."""
    device = engine.accumulator.device
    total = balanced.no_routing(device)
    with _restored_state(engine.model, device):
        pending = [list(group) for group in _groups(engine, samples)][::-1]
        while pending:
            if should_abandon():
                raise WindowAbandonedError("the window was abandoned while the tokens of each expert were counted.")
            rows = pending.pop()
            states = random_states([device])
            try:
                microbatch = _collated(model_setup, [samples[row] for row in rows], device)
                total += balanced.routing(engine.model, microbatch)
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                message = first_line(error)
            set_random_states(states, [device])  # the halves draw what they draw in the second pass
            free_cached_memory()  # outside of the except block, whose traceback holds the tensors of the attempt
            if len(rows) == 1:
                raise MemoryLimitError(
                    f"sample {rows[0]} of the batch, {len(samples[rows[0]]['input_ids']):,} tokens long, does not fit "
                    f"in memory by itself, even without gradient ({message}). Shorten it, or use weights in a lower "
                    "precision."
                )
            middle = (len(rows) + 1) // 2
            pending += [rows[middle:], rows[:middle]]
    return total


def _lockstep_routing(engine: Engine, model_setup: ModelSetup, balanced: LoadBalancedLoss, samples: Samples) -> Routing:
    """Count as `_routing` does, in as many micro-batches on each rank, because forwards are collective."""
    groups = _groups(engine, samples)
    most = int(max(number for (number,) in engine.sync.all_gather([float(len(groups))])))
    device, padding = engine.accumulator.device, engine.sync.padding_microbatch
    total = balanced.no_routing(device)
    with _restored_state(engine.model, device):
        for place in range(most):
            counts = place < len(groups)
            microbatch = _collated(model_setup, [samples[row] for row in groups[place]], device) if counts else padding
            try:
                routing = balanced.routing(engine.model, microbatch)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise ShardedMemoryError(
                    f"memory ran out in a micro-batch without gradient ({first_line(error)}), and the other ranks "
                    "cannot wait for it to be split: start again from a checkpoint with smaller micro-batches."
                ) from error
            total = total + routing if counts else total
    return total


def _groups(engine: Engine, samples: Samples) -> Sequence[Sequence[int]]:
    return engine.groups([len(sample["input_ids"]) for sample in samples]) if samples else []


def _collated(model_setup: ModelSetup, samples: Samples, device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in model_setup.collate(samples).items()}


@contextmanager
def _restored_state(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore random states and the buffers of the model."""
    devices = [device]
    states = random_states(devices)
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        set_random_states(states, devices)
        with torch.no_grad():
            for buffer, copy in buffers:
                buffer.copy_(copy)
