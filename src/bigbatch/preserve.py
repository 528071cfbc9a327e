"""Put a model and the random generators back as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bigbatch.rng import random_states, set_random_states


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
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    states = random_states(devices)
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
        set_random_states(states, devices)
