"""What an update may do with its gradient, and its result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

NO_ITEMS = "no items"
NonFinite: TypeAlias = Literal["skip", "raise"]

GradientHook: TypeAlias = Callable[[Sequence[Tensor]], object]
"""Receives the parameters that have a gradient; ``.grad`` is the divided, clipped gradient of the window."""


@dataclass(frozen=True)
class UpdateOutcome:
    """The result of an update.

    Attributes:
        grad_norm: 2-norm of the divided gradient before clipping; NaN without items.
        skipped: Why nothing was updated; None if it was.
        extra_scalars: Values read from the device together with the norm.
    """

    grad_norm: float
    skipped: str | None = None
    extra_scalars: tuple[float, ...] = ()
