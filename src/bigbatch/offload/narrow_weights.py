"""Weights that are bfloat16 on the device, and whose float32 values, the master weights, live in host memory.

under autocast     F.linear(x, weight) = F.linear(x.bfloat16(), weight.bfloat16()): the same bits from either weight
in the update      the master weight takes the place of the weight, for the step of the optimizer
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bigbatch.errors import WindowStateError
from bigbatch.offload.state_chunk import StateChunk


class NarrowWeights:
    """The weights of a model that are bfloat16 on the device.

    Args:
        names: Those that may become so, with their names.

    Attributes:
        names: As passed; without those that `keep_wide` has removed.
        narrowed: Those that are bfloat16 now.
    """

    def __init__(self, names: Mapping[Tensor, str]) -> None:
        self.names = dict(names)
        self.narrowed: dict[Tensor, int] = {}  # with their versions after the last write of ours
        self._gradients: Mapping[Tensor, Tensor] = {}

    def dtype_of(self, parameter: Tensor) -> torch.dtype:
        """Return the dtype in which the optimizer sees a parameter."""
        return torch.float32 if parameter in self.narrowed else parameter.dtype

    def add_masters(self, chunk: StateChunk) -> None:
        """Let a chunk hold the values of those of its parameters that are to be narrowed."""
        for parameter in chunk.parameters:
            if parameter in self.names and parameter not in chunk.masters and parameter.requires_grad:
                chunk.masters[parameter] = parameter.data

    def narrow(self, chunk: StateChunk) -> None:
        """Convert the parameters of a chunk whose values are in host memory."""
        for parameter in chunk.masters:
            if parameter not in self.narrowed:
                parameter.data = parameter.data.to(torch.bfloat16)
                self.narrowed[parameter] = parameter._version

    def check_unwritten(self) -> None:
        """Raise if other code has written to a narrow weight: the next update would overwrite it.

        Raises:
            WindowStateError: It has.
        """
        for parameter, version in self.narrowed.items():
            if parameter._version != version:
                raise WindowStateError(
                    f'the weight {self.names[parameter]} was written to by other code, and with offload="master" its '
                    "value in float32 is in host memory, which the next update would write back: change weights with "
                    "engine.load_state_dict(), or before the engine is made."
                )

    def hand_over(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """Use these float32 gradients of narrow weights in the next steps."""
        self._gradients = gradients

    def has_gradient(self, parameter: Tensor) -> bool:
        """Return whether the next step updates a parameter."""
        return parameter.grad is not None or parameter in self._gradients

    @contextmanager
    def stepping(self, masters: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """Put master weights, on the device, and float32 gradients in place of narrow ones; then narrow the result."""
        before = {parameter: parameter.data for parameter in masters}
        try:
            for parameter, master in masters.items():
                parameter.data = master
                parameter.grad = self._gradients.get(parameter)
            yield
            for parameter, narrow in before.items():
                if parameter.data_ptr() != masters[parameter].data_ptr():  # the optimizer has replaced it
                    masters[parameter].copy_(parameter.data)
                narrow.copy_(masters[parameter])
        finally:
            for parameter, narrow in before.items():
                parameter.grad = None
                parameter.data = narrow
                self.narrowed[parameter] = parameter._version

    @contextmanager
    def wide(self, masters: Mapping[Tensor, Tensor], device: torch.device | None = None) -> Iterator[None]:
        """Put master weights in place of narrow weights, to be read: those in host memory, or copies on a device."""
        before = {parameter: parameter.data for parameter in masters if parameter in self.narrowed}
        try:
            for parameter in before:
                master = masters[parameter]
                parameter.data = master if device is None else master.to(device)
            yield
        finally:
            for parameter, narrow in before.items():
                parameter.data = narrow

    def refresh(self, masters: Mapping[Tensor, Tensor]) -> None:
        """Write narrow weights after their master weights have changed."""
        for parameter, master in masters.items():
            if parameter in self.narrowed:
                parameter.data.copy_(master)

    def keep_wide(self, parameter: Tensor, masters: dict[Tensor, Tensor]) -> None:
        """Put the float32 value of a weight back on the device, for good."""
        del self.names[parameter]
        if parameter in self.narrowed:
            del self.narrowed[parameter]
            parameter.data = masters[parameter].to(parameter.device, copy=True)
        masters.pop(parameter, None)


def find_narrow_weights(model: nn.Module, parameters: Sequence[Tensor]) -> dict[Tensor, str]:
    """Return the weights that a linear layer alone has, of those that an optimizer updates, with their names.

    The layer is exactly an ``nn.Linear``, and its weight a float32 parameter that no other module shares and no hook of
    other code waits for.
    """
    trained = set(parameters)
    owners: dict[Tensor, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[parameter] = owners.get(parameter, 0) + 1
    return {
        module.weight: f"{name}.weight".lstrip(".")
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module.weight in trained
        and type(module.weight) is nn.Parameter
        and module.weight.dtype is torch.float32
        and owners[module.weight] == 1
        and not module.weight._backward_hooks
        and not module.weight._post_accumulate_grad_hooks
    }
