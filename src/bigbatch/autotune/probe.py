"""The time and the peak of a real micro-batch, its gradients thrown away."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from bigbatch.autotune.peak_prediction import PredictionError
from bigbatch.execution.cuda_graphs import capture
from bigbatch.gradients.gradient_sums import GradientSums
from bigbatch.gradients.loss_totals import as_terms
from bigbatch.memory.allocation_tracker import AllocationTracker, MemoryCategory
from bigbatch.memory.usage import is_out_of_memory
from bigbatch.preserve import preserved
from bigbatch.types import Items

if TYPE_CHECKING:
    from bigbatch.types import LossFunction

MIN_SECONDS = 0.1  # of timing: small micro-batches are timed often
MIN_REPEATS = 2  # whatever they take: machines have other work, too


@dataclass(frozen=True)
class Probe:
    """What one micro-batch took.

    Attributes:
        seconds: Of forward and backward, the fastest of some.
        peak_bytes: The most that was allocated meanwhile, what was there before included; None if not asked for.
    """

    seconds: float
    peak_bytes: int | None


def probe(
    model: nn.Module,
    parameters: list[Tensor],
    loss_fn: "LossFunction",
    take: Callable[[], Any],
    *,
    held: Iterable[Tensor] | None = None,
    uses_cuda_graphs: bool = False,
) -> Probe:
    """Run one micro-batch several times, as within a window, and throw its gradients away.

    Random states, buffers and gradients are put back. On CUDA the device is waited for. Elsewhere the peak is that of a
    `AllocationTracker`, in a run that is not timed.

    Args:
        model: In training mode.
        parameters: Those of the optimizer.
        loss_fn: As for `bigbatch.Engine`.
        take: Makes the micro-batch, on the device.
        held: What is there already and counts, where the peak is asked for.
        uses_cuda_graphs: Whether to time what will be timed in training: a recording of it, where it can be recorded.

    Raises:
        PredictionError: ``loss_fn`` kept a tensor of the rehearsal.
        torch.OutOfMemoryError: It does not fit.
    """
    device = parameters[0].device
    with preserved(model, parameters=False), GradientSums(parameters) as sums:

        def run() -> None:
            losses = _losses(loss_fn(model, take()))
            if losses:
                sums.backward(reduce(add, losses))

        run()  # makes the sums, and whatever else is made once
        peak_bytes = None if held is None else _measure(held, sums, run, device)
        if uses_cuda_graphs and sums.grads_in_place() is not None:
            run = _captured(sums, partial(loss_fn, model, take())) or run
        spent_s, best_s, times = 0.0, float("inf"), 0
        while spent_s < MIN_SECONDS or times < MIN_REPEATS:
            _wait(device)
            started_s = time.perf_counter()
            run()
            _wait(device)
            took_s = time.perf_counter() - started_s
            spent_s, best_s, times = spent_s + took_s, min(best_s, took_s), times + 1
    return Probe(best_s, peak_bytes)


def _captured(sums: GradientSums, loss_of: Callable[[], Any]) -> Callable[[], None] | None:
    """Record forward and backward; None where that cannot be."""

    def run() -> None:
        if losses := _losses(loss_of()):
            sums.backward(reduce(add, losses))

    try:
        replay: Callable[[], None] = capture(run).replay
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return None
    return replay


def _losses(result: Any) -> list[Tensor]:
    """Give the losses that have items, as a window differentiates them."""
    losses = [loss_sum for loss_sum, items in as_terms(result).values() if not _is_zero(items)]
    if any(isinstance(loss_sum, FakeTensor) for loss_sum in losses):
        raise PredictionError(
            "loss_fn keeps tensors from one call to the next, in a cache outside of the model, and kept one of those "
            "without data that memory is predicted with. Keep them in the model; or start again, and pass a number or "
            'a TokenBudget instead of microbatch="auto".'
        )
    return losses


def _is_zero(items: Items) -> bool:
    return items == 0 if not isinstance(items, Tensor) else items.is_cpu and items.item() == 0


def _measure(held: Iterable[Tensor], sums: GradientSums, run: Callable[[], None], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        on_device: int = torch.cuda.max_memory_allocated(device)
        return on_device
    with AllocationTracker(device) as tracker:
        tracker.track(held, MemoryCategory.PARAMETERS)
        tracker.track((total for total in sums.snapshot_versions()[0] if total is not None), MemoryCategory.GRADIENTS)
        run()
    elsewhere: int = tracker.peak_bytes
    return elsewhere


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
