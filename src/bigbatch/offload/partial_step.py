"""One step of an optimizer in several calls, each over a part of its parameters: hooks and counts as of one call."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch.optim import Optimizer


class StepSettings:
    """Settings and attributes of an optimizer, which every chunk finds as they were before the step.

    An optimizer that counts its steps in a setting counts one.
    """

    def __init__(self, optimizer: "Optimizer") -> None:
        self._places: list[dict[str, Any]] = [vars(optimizer), *optimizer.param_groups]
        self._before = [_plain_values(place) for place in self._places]
        self._after: list[dict[str, Any] | None] = [None] * len(self._places)
        self._name = type(optimizer).__name__

    @contextmanager
    def of(self, group: dict[str, Any]) -> Iterator[None]:
        """Restore what the block changes, and compare it with what earlier blocks have changed."""
        yield
        for index, (place, before) in enumerate(zip(self._places, self._before, strict=True)):
            if index and place is not group:
                continue
            now = _plain_values(place)
            if self._after[index] not in (None, now):
                raise RuntimeError(
                    f"{self._name}.step() changes its settings differently for each part of the parameters, so that "
                    "they cannot be stepped one after the other."
                )
            self._after[index] = now
            place.update(before)

    def finish(self) -> None:
        """Apply the changes of one step."""
        for place, after in zip(self._places, self._after, strict=True):
            place.update(after or {})


def _plain_values(place: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in place.items() if isinstance(value, bool | int | float | str)}


@contextmanager
def without_hooks(optimizer: "Optimizer") -> Iterator[None]:
    """Run no hooks of an optimizer inside: they run once for a step, and see all of its parameters."""
    before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = before, after


@contextmanager
def only_parameters(optimizer: "Optimizer", of: dict[str, Any], parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let a group of an optimizer have these parameters alone inside, and all other groups none."""
    before = [(group, group["params"]) for group in optimizer.param_groups]
    try:
        for group, _ in before:
            group["params"] = list(parameters) if group is of else []
        yield
    finally:
        for group, all_parameters in before:
            group["params"] = all_parameters


def plain_step(optimizer: "Optimizer") -> None:
    """Call ``step`` of an optimizer without its hooks."""
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):  # torch has wrapped it
        step = step.__wrapped__
    step(optimizer)
