"""Types of the losses of language models: what an engine calls, and what a loss records besides its value."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from bigbatch.distributed.gradient_sync import GradientSync

LanguageLoss: TypeAlias = Callable[[Any, Any], tuple[Tensor, Any]]
"""``loss_fn(model, microbatch)`` returns the summed loss of a micro-batch and its items."""


class LossMetrics(Protocol):
    """Values that a loss function records besides the loss, such as the accuracy."""

    def clear(self) -> None:
        """Forget what was recorded."""

    def discard_last(self) -> None:
        """Forget what was recorded last: of a micro-batch that does not count."""

    def means(self, sync: GradientSync) -> dict[str, float]:
        """Return the mean of each value over the samples of all ranks since `clear`. Collective."""
