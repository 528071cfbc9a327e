"""Choose how the micro-batches of a model are run."""

from bigbatch.accumulation.accumulator import Accumulator
from bigbatch.coupled.coupled import Coupled
from bigbatch.errors import InputError
from bigbatch.execution.batch_norm_runner import BatchNormRunner
from bigbatch.execution.coupled_runner import CoupledRunner
from bigbatch.execution.cuda_graphs import CudaGraphRunner
from bigbatch.execution.oom_retry import OomRetry
from bigbatch.execution.overlap_runner import OverlapRunner
from bigbatch.execution.quantum_runner import QuantumRunner
from bigbatch.execution.runner import LockstepRunner, MicrobatchRunner
from bigbatch.gradients.fused_gradients import FusedGradients
from bigbatch.types import LossFunction


def make_runner(
    accumulator: Accumulator,
    fused: FusedGradients,
    quantum: int | None,
    loss_fn: LossFunction,
    *,
    cuda_graphs: bool,
    batch_norm: str | None = None,
) -> MicrobatchRunner:
    """Return the runner of an engine.

    Args:
        accumulator: Of the engine; captured graphs contain its measurement of the gradient noise scale.
        fused: Of the engine: windows that do not measure the noise scale then have graphs of their own.
        quantum: Of an engine with ``reproducible=True``; else None.
        loss_fn: Of the engine.
        cuda_graphs: Whether micro-batches are replayed as CUDA graphs.
        batch_norm: ``"exact"``, or None.

    Raises:
        InputError: A setting is not supported together with ``reproducible=True``.
    """
    model, sync, device, noise = accumulator.model, accumulator.sync, accumulator.device, accumulator.noise
    if accumulator.reproducible is not None and quantum is not None:
        _check_quanta(loss_fn, cuda_graphs=cuda_graphs, batch_norm=batch_norm, lockstep=sync.runs_in_lockstep)
        return QuantumRunner(model, device, sync, accumulator.reproducible, quantum)
    if isinstance(loss_fn, Coupled):
        return CoupledRunner(model, loss_fn, sync, device)
    if batch_norm is not None:
        return BatchNormRunner(loss_fn, sync, device)
    if sync.runs_in_lockstep:
        return LockstepRunner(model, is_sharded=sync.is_sharded)
    retry = OomRetry(model, device) if sync.overlap is None else OverlapRunner(model, device)
    if not cuda_graphs:
        return retry
    if noise is not None and fused.num_layers:
        noise.measure_whole_windows()
    elif noise is not None:
        noise.measure_every_window()
    return CudaGraphRunner(model, fallback=retry)


def _check_quanta(loss_fn: LossFunction, *, cuda_graphs: bool, batch_norm: str | None, lockstep: bool) -> None:
    """Refuse what does not compute each quantum by itself."""
    found = {
        "a Coupled loss": isinstance(loss_fn, Coupled),
        'batch_norm="exact"': batch_norm is not None,
        "cuda_graphs=True": cuda_graphs,
        "lockstep=True": lockstep,
    }
    for name, is_set in found.items():
        if is_set:
            raise InputError(
                f"reproducible=True computes each quantum by itself, and does not support {name}: remove one of the "
                "two."
            )
