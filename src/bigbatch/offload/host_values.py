"""Weights that reach a device in bfloat16, while their float32 values stay in host memory.

float32 weight in host memory ──rounded, copied──▶ bfloat16 weight on the device
                 └── its `HostValue`, until an engine has the value in a buffer of its own, or the device needs it
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bigbatch.errors import WindowStateError

_ATTRIBUTE = "_bigbatch_host_value"
"""Of a weight: so the value is freed with it, no loop has to hand it over, and there is one place for it."""


@dataclass(frozen=True, eq=False)
class HostValue:
    """The float32 value of a weight that is bfloat16 on a device.

    Attributes:
        value: In host memory.
        mark: What `mark` returned for the weight when it was rounded.
        name: Of the weight.
    """

    value: Tensor
    mark: tuple[int, int]
    name: str


def host_value(weight: Tensor) -> HostValue | None:
    """Return the float32 value that `move_to_device` has left in host memory, until it is freed there."""
    return getattr(weight, _ATTRIBUTE, None)


def whole_value(weight: Tensor) -> Tensor:
    """Return the float32 value of a weight that `move_to_device` has left in host memory; any other tensor itself."""
    found = host_value(weight)
    return weight if found is None else found.value


def keep(weight: Tensor, value: HostValue) -> None:
    """Keep a value in host memory for a weight that was rounded."""
    setattr(weight, _ATTRIBUTE, value)


def forget(weight: Tensor) -> None:
    """Free the value, which is elsewhere now."""
    delattr(weight, _ATTRIBUTE)


def widen(weights: Iterable[Tensor]) -> None:
    """Put the float32 values of weights on their devices; no-op for others.

    Raises:
        WindowStateError: Other code has changed one.
    """
    for weight in weights:
        found = host_value(weight)
        if found is not None:
            if mark(weight) != found.mark and differs(weight.data.to(found.value.device), found.value):
                raise WindowStateError(
                    f"the weight {found.name} was written to by other code while its float32 value was in host memory, "
                    "and that would be lost: change weights before move_to_device()."
                )
            weight.data = found.value.to(weight.device, copy=True)
            forget(weight)


def mark(parameter: Tensor) -> tuple[int, int]:
    """Return what changes when a parameter is written to, except through ``.data``, or gets other memory."""
    return parameter._version, parameter.data_ptr()


def differs(narrow: Tensor, master: Tensor) -> Tensor:
    """Return whether any bit of a narrow weight is not that of its rounded master weight, 0-d bool."""
    if narrow.dtype is not torch.bfloat16:  # other code has converted it
        return torch.ones((), dtype=torch.bool, device=master.device)
    return (narrow.view(torch.int16) != master.to(torch.bfloat16).view(torch.int16)).any()
