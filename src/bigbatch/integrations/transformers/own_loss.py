"""The loss of a trainer, as a window calls it: with the count that its kind needs, and checked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.errors import InputError
from bigbatch.integrations.transformers.own_code import OwnCode, name_of
from bigbatch.integrations.transformers.unit_refusals import class_name
from bigbatch.types import Items

ComputeLoss = Callable[..., Any]
"""``compute_loss(model, inputs, num_items_in_batch=...)`` of a trainer."""


class OwnLoss:
    """Calls the ``compute_loss`` of one trainer.

    Args:
        trainer: Its arguments are read when they are used.
        own_code: Notes its errors.

    Attributes:
        compute_loss: Of the trainer, of this window.
    """

    def __init__(self, trainer: Any, own_code: OwnCode) -> None:
        self._trainer, self._own_code = trainer, own_code
        self.compute_loss: ComputeLoss = trainer.compute_loss
        self._needs_num_items = False
        self._one_item = torch.ones((), dtype=torch.int64, device=trainer.args.device)

    def __call__(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Return the loss, 0-d; with a number of items it is not multiplied by the number of ranks."""
        own_rank = _own_rank_only(self._trainer.args) if num_items_in_batch is not None else nullcontext()
        with own_rank, self._own_code.call(loss_name(self._trainer)):
            loss: Any = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if not isinstance(loss, Tensor):
            raise InputError(
                f"compute_loss of {class_name(self._trainer)} returned a {type(loss).__name__}: return the mean loss, "
                "a 0-d tensor; or a pair of it and the outputs, only if return_outputs is True."
            )
        if loss.numel() != 1:
            raise InputError(
                f"compute_loss of {class_name(self._trainer)} returned a loss of shape {tuple(loss.shape)}: return "
                "its mean."
            )
        return loss.reshape(())

    def sum(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the loss of one that is a sum divided by the number of items: its sum, in float32 or wider."""
        return _wide(self(model, inputs, self._one_item))

    def sum_of_mean(self, model: nn.Module, inputs: Any, items: Items, *, may_need_count: bool) -> Tensor:
        """Return the mean loss times the items, in float32 or wider.

        Args:
            model: Its model.
            inputs: A prepared micro-batch.
            items: Of the micro-batch.
            may_need_count: Whether a loss that requires a number of items is called with it, and divided by it.
        """
        if not self._needs_num_items:
            try:
                return _wide(self(model, inputs)) * items
            except TypeError:
                if not may_need_count:
                    raise
        loss = self(model, inputs, self._one_item * items)
        self._needs_num_items = True
        return _wide(loss) * items


def loss_name(trainer: Any) -> str:
    """Return the loss of a trainer as the subject of a sentence about an error."""
    function = getattr(trainer, "compute_loss_func", None)
    own = "" if function is None else f" (compute_loss_func={name_of(function)})"
    return f"compute_loss of {class_name(trainer)}{own}"


@contextmanager
def _own_rank_only(args: Any) -> Iterator[None]:
    """Turn off, for one call, that losses over a number of items are multiplied by the number of ranks."""
    found = args.average_tokens_across_devices
    args.average_tokens_across_devices = False
    try:
        yield
    finally:
        args.average_tokens_across_devices = found


def _wide(loss: Tensor) -> Tensor:
    """Return a loss in float32 or wider: bfloat16 would round its sum to 8 bits."""
    return loss.float() if loss.dtype in (torch.bfloat16, torch.float16) else loss
