"""Optimizers whose level of offload is not chosen yet: state that is loaded stays in host memory until then.

The device may have no room for it. Levels above ``"none"`` keep it there; for ``"none"`` it moves to the device.
"""

import copy
from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigbatch.errors import MemoryLimitError, first_line
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory
from bigbatch.offload.state_loading import load_into_host_memory

if TYPE_CHECKING:
    from torch.optim import Optimizer


class DeferredOffload:
    """Lets ``load_state_dict`` of optimizers leave tensors in host memory while this object lives.

    Args:
        optimizers: Of an update.
    """

    def __init__(self, optimizers: Sequence["Optimizer"]) -> None:
        self._optimizers = tuple(optimizers)
        for optimizer in optimizers:
            load_into_host_memory(optimizer, attrgetter("dtype"), owner=self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "DeferredOffload":
        return DeferredOffload(copy.deepcopy(self._optimizers, memo))

    def move_to_device(self) -> None:
        """Move the state of each parameter to its device, as ``load_state_dict`` of the optimizer itself does.

        Raises:
            MemoryLimitError: It does not fit; what was moved is on the device.
        """
        try:
            for optimizer in self._optimizers:
                for parameter, values in optimizer.state.items():
                    if isinstance(parameter, Tensor):
                        values.update(_on_device(values, parameter.device))
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = first_line(error)
        free_cached_memory()  # outside of the except block, whose traceback holds tensors
        raise MemoryLimitError(
            f"the optimizer state that was loaded does not fit on the device ({message}): pass a level above none."
        )


def _on_device(values: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of a state on the device; counts of steps stay where the optimizer has them."""
    return {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor) and name != "step"}
