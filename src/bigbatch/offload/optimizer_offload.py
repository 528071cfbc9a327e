"""The optimizers of an update whose state is offloaded."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bigbatch.errors import InputError
from bigbatch.offload.levels import Offload, check_level
from bigbatch.offload.optimizer_trial import check_streamable
from bigbatch.offload.streamed_optimizer import InitState, StreamedOptimizer

if TYPE_CHECKING:
    from torch.optim import Optimizer


class OptimizerOffload:
    """Steps the optimizers of an update with their state in host memory.

    Args:
        optimizers: Each over parameters on one device.

    Attributes:
        streamed: One for each optimizer, in order.

    Raises:
        InputError: One cannot be stepped in parts, or parameters are on several devices or sharded.
    """

    def __init__(self, optimizers: Sequence["Optimizer"]) -> None:
        for optimizer in optimizers:
            check_streamable(optimizer)
        self.streamed = [StreamedOptimizer(optimizer) for optimizer in optimizers]

    @property
    def host_bytes(self) -> int:
        """Host memory of the state."""
        return sum(each.host_bytes for each in self.streamed)

    @property
    def device_bytes(self) -> int:
        """Memory of the device that an update needs for the state that passes through."""
        return max((each.device_bytes for each in self.streamed), default=0)

    def prepare(self, init_state: InitState) -> None:
        """Move all state to host memory, and create what is missing; arguments and errors are those of each."""
        for each in self.streamed:
            each.prepare(init_state)

    def step(self, optimizer: "Optimizer") -> None:
        """Step one of the optimizers."""
        self._of(optimizer).step()

    def has_begun(self, optimizer: "Optimizer") -> bool:
        """Return whether the last step of an optimizer may have changed a parameter."""
        return self._of(optimizer).has_begun

    def without_state(self) -> "Optimizer":
        """Return an optimizer over the same parameters whose step needs the memory of these, to predict the peak."""
        parameters = [p for each in self.streamed for group in each.optimizer.param_groups for p in group["params"]]
        return WithoutState(parameters, self.device_bytes + self._largest_chunk_bytes)

    @property
    def _largest_chunk_bytes(self) -> int:
        """For temporary tensors of a step over one chunk, which are about as large as its state."""
        return max((each.largest_chunk_bytes for each in self.streamed), default=0)

    def _of(self, optimizer: "Optimizer") -> StreamedOptimizer:
        return next(each for each in self.streamed if each.optimizer is optimizer)


class WithoutState(torch.optim.Optimizer):
    """An optimizer without state, whose step allocates memory and changes nothing.

    Args:
        parameters: Of its only group.
        step_bytes: What a step allocates, on the device of the first parameter.
    """

    def __init__(self, parameters: Sequence[Tensor], step_bytes: int) -> None:
        super().__init__(parameters, {})
        self.step_bytes = step_bytes

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Allocate memory."""
        torch.empty(self.step_bytes, dtype=torch.uint8, device=self.param_groups[0]["params"][0].device)


def offload_optimizers(optimizers: Sequence["Optimizer"], level: Offload) -> OptimizerOffload | None:
    """Return what steps optimizers at a level of offload; None for ``"none"``.

    Raises:
        InputError: The level does not exist, or is not supported for these optimizers.
    """
    if check_level(level) == "none":
        return None
    if not optimizers:
        raise InputError(f"offload={level!r} moves the state of the optimizer, and there is none: pass the optimizer.")
    _check_parameters([p for each in optimizers for group in each.param_groups for p in group["params"]])
    return OptimizerOffload(optimizers)


def _check_parameters(parameters: Sequence[Tensor]) -> None:
    devices = sorted({str(parameter.device) for parameter in parameters})
    if len(devices) > 1 or not devices[0].startswith(("cuda", "cpu")):
        raise InputError(
            f"offload= copies between host memory and one CUDA device, and the parameters are on {', '.join(devices)}: "
            'move them to one, or leave offload="none".'
        )
    for parameter in parameters:
        if type(parameter) not in (Tensor, torch.nn.Parameter):
            raise InputError(
                f"a parameter of shape {tuple(parameter.shape)} is a {type(parameter).__name__}, and offload= supports "
                'whole, plain parameters only: for a sharded model leave offload="none".'
            )
