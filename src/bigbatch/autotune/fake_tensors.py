"""Run a training step on fake tensors: copies of model and optimizer without data, and errors in one sentence."""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bigbatch.errors import BigbatchError, first_line
from bigbatch.memory.allocation_tracker import AllocationTracker, MemoryCategory, tensors_in

if TYPE_CHECKING:
    from torch.optim import Optimizer


class PredictionError(BigbatchError, RuntimeError):
    """The step cannot run on fake tensors; the message has the reason."""


def proxy_device(device: torch.device) -> torch.device:
    """Return the device of the fake tensors for a prediction: ``device``, or the CPU if CUDA is not available."""
    return torch.device("cpu") if device.type == "cuda" and not torch.cuda.is_available() else device


def fake_copies(
    mode: FakeTensorMode, model: nn.Module, optimizers: "Sequence[Optimizer]", device: torch.device | None
) -> "tuple[nn.Module, Sequence[Optimizer]]":
    """Copy a model and its optimizers to fake tensors that share nothing with the originals.

    Args:
        mode: Mode of the fake tensors.
        model: On any device, ``meta`` included.
        optimizers: Over the parameters of ``model``.
        device: Device of the copies; None for the devices of the originals.

    Raises:
        PredictionError: The model or an optimizer cannot be copied.
    """
    copies: dict[int, Any] = {}  # the memo of deepcopy: id of the original → copy
    try:
        for tensor in [*model.parameters(), *model.buffers(), *tensors_in([vars(each) for each in optimizers])]:
            if id(tensor) not in copies:
                copies[id(tensor)] = _fake_copy(mode, tensor, device)
                if tensor.grad is not None:
                    copies[id(tensor.grad)] = None
        copies |= _copies_of_attributes(mode, model, device)
        fake_model, fake_optimizers = copy.deepcopy((model, tuple(optimizers)), copies)
        for optimizer, fake in zip(optimizers, fake_optimizers, strict=True):
            for name, value in vars(optimizer).items():  # attributes that torch's optimizers omit from their copies
                if name not in vars(fake) and name != "step":  # a scheduler's wrapper around the original's step
                    setattr(fake, name, copy.deepcopy(value, copies))
    except Exception as error:  # any exception that a user's module raises when copied
        raise PredictionError(f"the model or its optimizer cannot be copied ({first_line(error)})") from error
    return fake_model, fake_optimizers


def _copies_of_attributes(mode: FakeTensorMode, model: nn.Module, device: torch.device | None) -> dict[int, Any]:
    """Copy the tensors with a graph and the generators among the attributes, which deepcopy refuses to copy."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Generator):
                copies[id(value)] = value.clone_state()
            for tensor in tensors_in(value):
                if not tensor.is_leaf:
                    copies[id(tensor)] = _fake_copy(mode, tensor.detach(), device)
    return copies


def _fake_copy(mode: FakeTensorMode, tensor: Tensor, device: torch.device | None) -> Tensor:
    if device is None or device == tensor.device:
        fake: Tensor = mode.from_tensor(tensor)
        return fake
    shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    fake = FakeTensor(mode, shape, device)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


@contextmanager
def errors_as_prediction_errors() -> Iterator[None]:
    """Convert every exception to a `PredictionError`, and keep torch from logging its traceback."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except PredictionError:
        raise
    except Exception as error:  # any exception that a user's model raises on fake tensors
        raise PredictionError(f"the step cannot run without data ({first_line(error)})") from error
    finally:
        log.setLevel(level)


@contextmanager
def attention_without_dropout() -> Iterator[None]:
    """Ignore dropout in attention: with it the CPU kernel materializes all pairs, which the CUDA kernel does not."""
    functional: Any = nn.functional
    attention = functional.scaled_dot_product_attention

    def without_dropout(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, *more: Any, **options: Any
    ) -> Any:
        return attention(query, key, value, attn_mask, 0.0, *more, **options)

    functional.scaled_dot_product_attention = without_dropout
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attention


@contextmanager
def loss_tracked_separately(tracker: AllocationTracker, model: nn.Module) -> Iterator[None]:
    """Categorize allocations of forward and backward as loss or activations.

    The outputs of the model and everything computed from them belong to the loss; in backward, so do allocations of
    autograd nodes that were created after the outputs.
    """
    last_model_node = [-1]

    def after_forward(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
        tensors = tensors_in(outputs)
        tracker.track(tensors, MemoryCategory.LOSS)
        tracker.set_category(part)
        nodes = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        last_model_node[0] = max((node._sequence_nr() for node in nodes), default=-1)

    def part() -> MemoryCategory:
        node = torch._C._current_autograd_node()
        if node is None or ("AccumulateGrad" not in node.name() and node._sequence_nr() > last_model_node[0]):
            return MemoryCategory.LOSS
        return MemoryCategory.ACTIVATIONS

    tracker.set_category(MemoryCategory.ACTIVATIONS)
    handle = model.register_forward_hook(after_forward)
    try:
        yield
    finally:
        handle.remove()
