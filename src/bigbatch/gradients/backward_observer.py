"""Interface of what sees the backwards of a window."""

from typing import Protocol

from torch import Tensor


class BackwardObserver(Protocol):
    """Sees every backward of a `GradientSums` without changing it."""

    def on_gradient(self, gradient: Tensor) -> None:
        """Handle the whole gradient of one parameter, before it is added to its sum."""

    def on_backward_end(self, *, succeeded: bool) -> None:
        """Handle the end of a backward."""
