"""Save and restore the state of a model and of the random generators."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bigbatch.rng import random_states, set_random_states


@contextmanager
def preserved(model: nn.Module, *, parameters: bool = True) -> Iterator[None]:
    """Restore parameters, gradients, buffers, training modes and the random states of this process on exit.

    Parameters and buffers are copied to the host on entry. Inside the context every ``grad`` starts as None. Random
    states are those of torch on the CPU and on every CUDA device, of ``random``, and of NumPy if it is loaded.

    Args:
        model: The model whose state is restored.
        parameters: Whether to copy and restore the parameters as well; pass False if no update runs inside.
    """
    tensors: list[Tensor] = [*(model.parameters() if parameters else ()), *model.buffers()]
    copies = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]  # a forward may rebind buffers
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    states = random_states(devices)
    for parameter in model.parameters():
        parameter.grad = None  # accumulation inside must not modify the gradients that are restored
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
