"""Measure the time and the peak memory of a real micro-batch; its gradients are discarded."""

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from bigbatch.autotune.peak_prediction import PredictionError, prediction_obstacle
from bigbatch.batching.batch_types import flatten
from bigbatch.execution.graph_capture import capture
from bigbatch.gradients.gradient_sums import GradientSums
from bigbatch.gradients.loss_totals import as_terms
from bigbatch.gradients.sum_store import PassingSums, SumStore
from bigbatch.memory.allocation_tracker import AllocationTracker, MemoryCategory
from bigbatch.memory.usage import is_out_of_memory
from bigbatch.preserve import preserved
from bigbatch.trials.loss_modules import modules_used_by
from bigbatch.trials.parameter_writes import ParameterWrites

if TYPE_CHECKING:
    from bigbatch.types import LossFunction

MIN_SECONDS = 0.1  # of timing in total: small micro-batches are repeated more often
MIN_REPEATS = 2  # for any duration: other processes may disturb one run
MAX_REPEATS = 10  # for any duration: loss_fn may have side effects
_SCHEDULER_STATISTICS = Path("/proc/thread-self/schedstat")  # of Linux: ns on a CPU, ns waiting for one, time slices


@dataclass(frozen=True)
class Probe:
    """Measurements of one micro-batch.

    Attributes:
        seconds: Time of forward and backward, the minimum over repetitions, on the CPU without the time that
            other processes took it; None if not requested.
        peak_bytes: Peak of allocated memory, resident tensors included; None if not requested.
    """

    seconds: float | None
    peak_bytes: int | None


def probe(
    model: nn.Module,
    parameters: list[Tensor],
    loss_fn: "LossFunction",
    take: Callable[[], Any],
    *,
    resident: Iterable[Tensor] | None = None,
    timed: bool = True,
    uses_cuda_graphs: bool = False,
    keeps_sums: bool = True,
) -> Probe:
    """Run forward and backward of one micro-batch several times, as in a window, and discard the gradients.

    Calls ``loss_fn`` at most 12 times. Restores random states, gradients, buffers, and whatever else hangs on the model
    and on the modules that ``loss_fn`` uses. On CUDA the host synchronizes with the device; elsewhere the peak
    comes from an `AllocationTracker`, in a run that is not timed.

    Args:
        model: In training mode.
        parameters: The parameters of the optimizer.
        loss_fn: As for `bigbatch.Engine`.
        take: Returns the micro-batch, on the device.
        resident: Tensors that are already allocated and count towards the peak; None to skip measuring the peak.
        timed: Whether to measure the time.
        uses_cuda_graphs: Whether to time the replay of a captured CUDA graph, if forward and backward can be captured.
        keeps_sums: Whether gradients are added up on the device, as they are without ``offload="gradients"``.

    Raises:
        PredictionError: ``loss_fn`` has cached a fake tensor of the prediction.
        torch.OutOfMemoryError: The micro-batch does not fit.
    """
    device = parameters[0].device
    with (
        preserved(model, *modules_used_by(loss_fn), parameters=False) as state,
        ParameterWrites.restored(tensor for tensor in state.tensors if isinstance(tensor, nn.Parameter)) as writes,
        GradientSums(parameters, store=SumStore() if keeps_sums else PassingSums()) as sums,
    ):

        def run(take: Callable[[], Any] = take) -> None:
            losses = _losses(loss_fn(model, take()))
            if losses:
                sums.backward(reduce(add, losses))

        with nullcontext() if prediction_obstacle(model) is not None else writes:  # compiled code runs under no mode
            run()  # allocates the sums, and initializes what is created on first use
        peak_bytes = None if resident is None else _measure_peak(resident, sums, run, take, device)
        if not timed:
            return Probe(None, peak_bytes)
        timed_run: Callable[[], None] = run
        if uses_cuda_graphs and sums.grads_in_place() is not None:
            timed_run = _capture(sums, partial(loss_fn, model, take())) or run
        return Probe(_min_seconds(timed_run, device), peak_bytes)


def _min_seconds(run: Callable[[], None], device: torch.device) -> float:
    total_s, best_s, repeats = 0.0, float("inf"), 0
    while repeats < MIN_REPEATS or (total_s < MIN_SECONDS and repeats < MAX_REPEATS):
        _synchronize(device)
        started_s = time.perf_counter() - _waited_s(device)
        run()
        _synchronize(device)
        elapsed_s = -_waited_s(device) + time.perf_counter() - started_s  # read first: a later wait is not in the clock
        total_s, best_s, repeats = total_s + elapsed_s, min(best_s, elapsed_s), repeats + 1
    return best_s


def _waited_s(device: torch.device) -> float:
    """Return the seconds that this thread was ready to run while other threads had the CPU; 0 where that is unknown.

    On a busy machine they are most of the time of a run on the CPU, and different in each, so that sizes could not be
    compared. Other devices compute meanwhile.
    """
    if device.type != "cpu":
        return 0.0
    try:
        return int(_SCHEDULER_STATISTICS.read_bytes().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _capture(sums: GradientSums, compute_loss: Callable[[], Any]) -> Callable[[], None] | None:
    """Capture forward and backward in a CUDA graph and return its replay; None if they cannot be captured."""

    def run() -> None:
        if losses := _losses(compute_loss()):
            sums.backward(reduce(add, losses))

    try:
        replay: Callable[[], None] = capture(run).replay
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return None
    return replay


def _losses(result: Any) -> list[Tensor]:
    """Return the loss sums of terms with a gradient, as a window differentiates them."""
    losses = [loss_sum for loss_sum, _ in as_terms(result).values() if loss_sum.requires_grad]
    if any(isinstance(loss_sum, FakeTensor) for loss_sum in losses):
        raise PredictionError(
            "loss_fn caches tensors outside the model between calls, and has cached a fake tensor of the memory "
            "prediction. Store them in the model; or restart, and pass a number or a TokenBudget instead of "
            'microbatch="auto".'
        )
    return losses


def _measure_peak(
    resident: Iterable[Tensor],
    sums: GradientSums,
    run: Callable[[Callable[[], Any]], None],
    take: Callable[[], Any],
    device: torch.device,
) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run(take)
        cuda_peak: int = torch.cuda.max_memory_allocated(device)
        return cuda_peak
    leaves, structure = flatten(take())
    with AllocationTracker(device) as tracker:
        tracker.track(resident, MemoryCategory.PARAMETERS)
        tracker.track((total for total in sums.snapshot_versions()[0] if total is not None), MemoryCategory.GRADIENTS)
        # Copied, because a slice would count with the storage of the whole batch.
        run(lambda: structure.unflatten(leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves))
    tracked_peak: int = tracker.peak_bytes
    return tracked_peak


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
