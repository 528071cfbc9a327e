"""What an update may do with its gradient, and its result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from bigbatch.errors import NonFiniteError

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


def skip_or_raise(grad_norm: float, why: str, *, nonfinite: NonFinite, num_steps: int | None) -> UpdateOutcome:
    """Return the outcome of an update that is skipped.

    Args:
        grad_norm: Of the window.
        why: What is not finite.
        nonfinite: Whether to raise instead.
        num_steps: Updates applied so far; None if other code counts them.

    Raises:
        NonFiniteError: ``nonfinite`` is ``"raise"``.
    """
    if nonfinite == "raise":
        number = "" if num_steps is None else f" after update {num_steps}"
        raise NonFiniteError(
            f"the window{number} has a {why}, and changed nothing: look at its samples, lower the learning rate, "
            'or pass nonfinite="skip" to continue without such windows.'
        )
    return UpdateOutcome(grad_norm, skipped=why)
