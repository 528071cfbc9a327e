"""Run a model without a trace: save and restore its state, everything that hangs on it, and the random generators."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bigbatch.rng import random_states, set_random_states
from bigbatch.trials.object_state import ObjectState
from bigbatch.trials.trial import trial


@contextmanager
def preserved(*modules: nn.Module, parameters: bool = True) -> Iterator[ObjectState]:
    """Restore the state of modules and the random states of this process on exit; inside, `is_trial` returns True.

    Restores what `module_state_preserved` does. Random states are those of torch on the CPU and on every CUDA device,
    of ``random``, and of NumPy if it is loaded.

    Args:
        modules: The model, and other modules that run inside.
        parameters: Whether to copy and restore the values of parameters as well; pass False if no update runs inside.

    Yields:
        As `module_state_preserved`.
    """
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    states = random_states(devices)
    try:
        with module_state_preserved(*modules, parameters=parameters) as state:
            yield state
    finally:
        set_random_states(states, devices)


@contextmanager
def module_state_preserved(*modules: nn.Module, parameters: bool = True) -> Iterator[ObjectState]:
    """Restore parameters, gradients, buffers, training modes and attributes of modules on exit.

    Attributes are restored as by `ObjectState`: counters, lists, dicts, arrays, tensors, generators, objects. Values of
    tensors are copied to the host on entry. Inside the context every ``grad`` starts as None.

    Args:
        modules: Their submodules are included, and modules that hang on them in another way.
        parameters: Whether to copy and restore the values of parameters as well.

    Yields:
        The state, whose `ObjectState.restore` restores everything but gradients and training modes, to start once more.
    """
    state = ObjectState(parameters=parameters)
    state.add(*modules)
    modes = [(module, module.training) for module in state.modules]
    gradients = [(tensor, tensor.grad) for tensor in state.tensors if _may_have_grad(tensor)]
    try:
        with trial():
            for tensor, _ in gradients:
                tensor.grad = None  # accumulation inside must not modify the gradients that are restored
            yield state
    finally:
        try:
            state.restore()
        finally:
            for tensor, gradient in gradients:
                tensor.grad = gradient
            for module, training in modes:
                module.training = training


def _may_have_grad(tensor: Tensor) -> bool:
    return tensor.is_leaf and (tensor.requires_grad or isinstance(tensor, nn.Parameter))
