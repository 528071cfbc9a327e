"""Put a model and the random generators back as they were."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def preserved(model: nn.Module, *, parameters: bool = True) -> Iterator[None]:
    """Restore on leaving: parameters, gradients, buffers, training modes, and the random states of this process.

    Keeps a copy of the parameters and buffers on the host meanwhile. Random states are those of torch on the CPU and on
    every CUDA device in use, of ``random``, and of NumPy where it is loaded.

    Args:
        model: Whose state is restored.
        parameters: Whether the parameters are, too; without an update in between they stay as they are.
    """
    tensors: list[Tensor] = [*(model.parameters() if parameters else ()), *model.buffers()]
    copies = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]  # a forward may bind other ones
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    random_states = _random_states()
    for parameter in model.parameters():
        parameter.grad = None  # what is added meanwhile must not reach the tensors that come back
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                if not torch.equal(tensor.cpu(), copy):
                    tensor.copy_(copy)
        for module, bound in buffers:
            module._buffers.update(bound)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
        _set_random_states(*random_states)


def seed_everything(seed: int) -> None:
    """Seed every generator that `preserved` restores."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def _random_states() -> tuple[Tensor, list[Tensor], Any, Any]:
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
    return torch.get_rng_state(), on_cuda, random.getstate(), numpy


def _set_random_states(on_cpu: Tensor, on_cuda: list[Tensor], python: Any, numpy: Any) -> None:
    torch.set_rng_state(on_cpu)
    if on_cuda:
        torch.cuda.set_rng_state_all(on_cuda)
    random.setstate(python)
    if numpy is not None:
        sys.modules["numpy"].random.set_state(numpy)
