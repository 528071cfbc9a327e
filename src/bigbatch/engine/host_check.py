"""Refuse offload before the first window if the host has too little memory for the state that it will hold."""

import os
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bigbatch.accumulation.accumulator import Accumulator
from bigbatch.autotune.peak_prediction import PeakPredictor, PredictionError
from bigbatch.gradients.sum_store import SumStore
from bigbatch.offload.costs import pinned_bytes
from bigbatch.offload.host_memory import available_host_bytes, check_host_memory


def check_host(accumulator: Accumulator) -> None:
    """Check that the host has memory for the state, weights and gradient sums that a level of offload moves there.

    The state is predicted from a step on tensors without data. What is in host memory already counts as available.
    Processes that torchrun started on this machine share its memory.

    Args:
        accumulator: Of the engine; nothing is checked without offload.

    Raises:
        MemoryLimitError: It has not.
    """
    offload = accumulator.update.offload
    if offload is None:
        return
    num_processes = num_local_processes()
    with suppress(PredictionError):  # then the allocation itself fails, with a sentence
        state_bytes, sum_bytes = predicted_host_bytes(accumulator)
        needed = pinned_bytes(state_bytes + sum_bytes) - offload.host_bytes
        check_host_memory(
            needed, available_host_bytes(num_processes=num_processes), level=offload.level, num_processes=num_processes
        )


def predicted_host_bytes(accumulator: Accumulator) -> tuple[int, int]:
    """Return the bytes that offload moves to host memory: state with float32 weights, and gradient sums.

    Raises:
        PredictionError: The optimizers cannot step on tensors without data.
    """
    offload = accumulator.update.offload
    if offload is None:
        return 0, 0
    masters = sum(weight.numel() * torch.float32.itemsize for weight in offload.weights.names)
    sum_bytes = 0 if offload.sums is None else SumStore.bytes_of(accumulator.update.parameters())
    return _state_bytes(accumulator) + masters, sum_bytes


def num_local_processes() -> int:
    """Return the processes of the run on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _has_ranks() else 1


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized()


def _state_bytes(accumulator: Accumulator) -> int:
    """Predict the bytes of the optimizer state."""
    update = accumulator.update

    def no_loss(_model: nn.Module, _microbatch: object) -> None:
        raise AssertionError("only the state is predicted")

    loss_fn: Any = no_loss
    device = accumulator.device
    with update.whole_weights():  # in the dtype of their state, those of narrow weights on the host
        parameters = nn.ParameterList(update.parameters())
        predictor = PeakPredictor.from_training(parameters, update.optimizers, loss_fn, device=device)
    state_bytes: int = predictor.state_bytes
    return state_bytes
