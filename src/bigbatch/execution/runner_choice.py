"""Choose how the micro-batches of a model are run."""

import torch
from torch import nn

from bigbatch.accumulation.noise_observer import NoiseObserver
from bigbatch.distributed.gradient_sync import GradientSync
from bigbatch.execution.cuda_graphs import CudaGraphRunner
from bigbatch.execution.oom_retry import OomRetry
from bigbatch.execution.runner import LockstepRunner, MicrobatchRunner


def make_runner(
    model: nn.Module, sync: GradientSync, device: torch.device, *, cuda_graphs: bool, noise: NoiseObserver | None
) -> MicrobatchRunner:
    """Return the runner of an engine.

    Args:
        model: As passed by the user.
        sync: Its synchronization over ranks.
        device: Of its first parameter.
        cuda_graphs: Whether micro-batches are replayed as CUDA graphs.
        noise: Measures the gradient noise scale; captured graphs contain its measurement.
    """
    if sync.runs_in_lockstep:
        return LockstepRunner(model, is_sharded=sync.is_sharded)
    retry = OomRetry(model, device)
    if not cuda_graphs:
        return retry
    if noise is not None:
        noise.measure_every_window()
    return CudaGraphRunner(model, fallback=retry)
