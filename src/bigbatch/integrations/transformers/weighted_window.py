"""A window whose micro-batches `weights` weights, and their inputs.

batches → prepared inputs, weights of them → one after the other; items and losses of a window without an update → next
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

from torch import Tensor

from bigbatch.errors import InputError
from bigbatch.integrations.transformers.unit_refusals import class_name

NUM_ITEMS = "num_items_in_batch"  # a keyword of compute_loss; and of inputs, in some of TRL's losses


@dataclass
class WeightedWindow:
    """The micro-batches of an update that are not run yet.

    Attributes:
        batches: As the loader yielded them.
        carried: Items of all ranks of the windows before it that no update followed, whose gradient it continues.
        carried_loss: What their training steps have returned.
        prepared: Their inputs; empty before the first one is prepared.
        weights: As many.
        total: Items of all ranks, with those carried; 0 before the first micro-batch is prepared.
        is_running: Whether a training step is running.
        is_complete: Whether the last training step was that of an update.
        loss: Sum of what training steps have returned.
    """

    batches: list[Any]
    carried: float = 0.0
    carried_loss: Tensor | float = 0.0
    prepared: list[Any] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    weight: float | None = None
    total: float = 0.0
    is_running: bool = False
    is_complete: bool = False
    loss: Tensor | float = 0.0

    @classmethod
    def after(cls, before: Self | None, batches: Sequence[Any]) -> Self:
        """Return a window, with what the one before it has left without an update."""
        if before is None or before.is_complete or not before.total:
            return cls(list(batches))
        return cls(list(batches), before.total, before.loss)

    def logged(self, loss: Tensor, *, is_complete: bool) -> Tensor:
        """Return what a training step adds to the logged loss, so that it adds up to that of the window.

        Args:
            loss: Of its micro-batch, weighted.
            is_complete: Whether an update follows.
        """
        if self.carried and not isinstance(self.loss, Tensor):  # its first micro-batch
            loss = loss - (1.0 - self.carried / self.total) * self.carried_loss
            self.loss = self.carried_loss
        self.loss, self.is_complete = self.loss + loss, is_complete
        return loss


class CheckedInputs(dict[str, Any]):
    """Inputs of a micro-batch, of which a number of items of several micro-batches may not be read.

    Args:
        inputs: Prepared.
        trainer: For the message.
    """

    def __init__(self, inputs: dict[str, Any], trainer: Any) -> None:
        super().__init__(inputs)
        self._trainer = trainer

    def __getitem__(self, key: str) -> Any:
        if key == NUM_ITEMS:
            self._refuse()
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, as by its key."""
        if key == NUM_ITEMS:
            self._refuse()
        return super().get(key, default)

    def _refuse(self) -> NoReturn:
        raise InputError(
            f"compute_loss of {class_name(self._trainer)} reads inputs[{NUM_ITEMS!r}], the items of several "
            "micro-batches, so its loss is a sum divided by all of them, and weights() is for means: leave weights() "
            'out, or use a loss that is a mean (of TRL\'s GRPO, a loss_type other than "dapo", "cispo" and "vespo").'
        )
