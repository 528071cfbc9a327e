"""The time and the peak of a real micro-batch, its gradients thrown away."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bigbatch.accumulate import GradientSums
from bigbatch.memory.tracker import Part, Tracker
from bigbatch.objective import as_terms
from bigbatch.preserve import preserved

if TYPE_CHECKING:
    from bigbatch.engine import LossFunction

SHORTEST_S = 0.05  # of timing: small micro-batches are timed often
LEAST_TIMES = 2  # whatever they take: machines have other work, too


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
    measure_memory: bool = True,
) -> Probe:
    """Run forward and backward of a micro-batch a few times, with gradient sums there, as in the middle of a window.

    Random states, buffers and gradients are put back; nothing is learned. On CUDA the statistics of the peak are reset
    and the device is waited for. On the CPU the peak is that of a `Tracker`, in a run that is not timed.

    Args:
        model: In training mode.
        parameters: Those of the optimizer.
        loss_fn: As for `bigbatch.Engine`.
        take: Makes the micro-batch, on the device.
        measure_memory: Whether the peak is asked for: on the CPU it costs one more run.

    Raises:
        torch.OutOfMemoryError: It does not fit.
    """
    device = parameters[0].device
    with preserved(model, parameters=False), GradientSums(parameters) as sums:

        def run() -> None:
            terms = as_terms(loss_fn(model, take()))
            sums.backward(reduce(add, (loss_sum for loss_sum, _ in terms.values())))

        run()  # makes the sums, and whatever else is made once
        peak_bytes = _measure(model, parameters, sums, run, device) if measure_memory else None
        spent_s, best_s, times = 0.0, float("inf"), 0
        while spent_s < SHORTEST_S or times < LEAST_TIMES:
            _wait(device)
            started_s = time.perf_counter()
            run()
            _wait(device)
            took_s = time.perf_counter() - started_s
            spent_s, best_s, times = spent_s + took_s, min(best_s, took_s), times + 1
    return Probe(best_s, peak_bytes)


def _measure(
    model: nn.Module, parameters: list[Tensor], sums: GradientSums, run: Callable[[], None], device: torch.device
) -> int | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        on_device: int = torch.cuda.max_memory_allocated(device)
        return on_device
    if device.type != "cpu":
        return None
    with Tracker(device) as tracker:
        tracker.hold([*model.parameters(), *model.buffers(), *parameters], Part.PARAMETERS)
        tracker.hold(sums.tensors(), Part.GRADIENTS)
        run()
    on_host: int = tracker.peak_bytes
    return on_host


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
