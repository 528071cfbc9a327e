"""A loss function of the user, as the trainer calls it: under autocast, and checked.

loss_fn(model, microbatch) → (loss_sum, items) → float32 sum and count, 0-d tensors
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.errors import InputError
from bigbatch.lm.device import DeviceSpec


class CustomLoss:
    """A loss function for `bigbatch.Engine` that calls the user's.

    Args:
        loss_fn: ``loss_fn(model, microbatch)``, which returns the 0-d sum of the losses and the number of items.
        device_spec: Decides about autocast.
    """

    def __init__(self, loss_fn: Callable[[Any, dict[str, Tensor]], Any], device_spec: DeviceSpec) -> None:
        self._loss_fn = loss_fn
        self._device_spec = device_spec

    def __call__(self, model: nn.Module, microbatch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the summed loss of one micro-batch.

        Returns:
            The 0-d sum and the 0-d count.

        Raises:
            InputError: The function returned something else.
        """
        with self._device_spec.autocast():
            found = self._loss_fn(model, microbatch)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor)):
            raise InputError(
                f"loss_fn returned {_kind(found)}: return (loss_sum, count), the sum of the losses and what it is "
                "divided by."
            )
        loss_sum, count = found
        items = count if isinstance(count, Tensor) else torch.tensor(count, dtype=torch.float64)
        if loss_sum.dim() or items.dim():
            raise InputError(
                f"loss_fn returned tensors of the shapes {list(loss_sum.shape)} and {list(items.shape)}: return a sum "
                "and a count without dimensions, such as losses.sum() and mask.sum()."
            )
        return loss_sum, items


def _kind(found: Any) -> str:
    return f"{len(found)} values" if isinstance(found, tuple) else type(found).__name__


def name_of(loss_fn: Callable[..., Any]) -> str:
    """Return the name of a function, or of the class of another callable."""
    return getattr(loss_fn, "__qualname__", type(loss_fn).__qualname__)
