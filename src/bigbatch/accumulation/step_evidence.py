"""Whether an optimizer's step changed anything: tensor versions, optimizer state, or as a last resort the values.

snapshot before the step → step → `moved` (a parameter changed) or `unchanged` (nothing did)
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.optim import Optimizer


class StepSnapshot:
    """Versions of the parameters and the state of one optimizer, before its step.

    Args:
        optimizer: Its parameters with a gradient are observed.
        with_values: Whether to read the values of the parameters as well, for optimizers that write to ``p.data``,
            which changes no version.
    """

    def __init__(self, optimizer: "Optimizer", *, with_values: bool) -> None:
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._versions = [p._version for p in self.parameters]
        self._had_state = any(optimizer.state.get(p) for p in self.parameters)
        self._state = _state_token(optimizer, self.parameters)
        self._checksums = _checksums(self.parameters) if with_values else None
        self._attributes = {} if is_builtin(optimizer) else _attributes(optimizer)

    @property
    def versions_changed(self) -> bool:
        """Whether the version of any parameter changed."""
        return any(p._version != version for p, version in zip(self.parameters, self._versions, strict=True))

    @property
    def state_changed(self) -> bool:
        """Whether the optimizer state changed."""
        return _state_token(self.optimizer, self.parameters) != self._state

    @property
    def attributes_changed(self) -> bool:
        """Whether the optimizer rebound an attribute of its own, not a number; False for wrappers of optimizers."""
        is_wrapper = any(isinstance(value, torch.optim.Optimizer) for value in vars(self.optimizer).values())
        return not is_wrapper and _attributes(self.optimizer) != self._attributes

    @property
    def changes_are_visible(self) -> bool:
        """Whether versions showed the step: new state does not, as lists of sharded tensors change no version."""
        return self.versions_changed or (self._had_state and self.state_changed)

    @property
    def values_changed(self) -> bool:
        """Whether the value of any parameter changed, if values were read. Waits for the device."""
        return self._checksums is not None and _checksums(self.parameters) != self._checksums

    @property
    def unchanged(self) -> bool:
        """Whether it is certain that no parameter and no state changed."""
        writes_are_visible = self._checksums is not None or (is_builtin(self.optimizer) and not self._is_blind)
        return writes_are_visible and not (self.versions_changed or self.state_changed or self.values_changed)

    @property
    def _is_blind(self) -> bool:
        """Whether a fused kernel may write without a trace: it changes no version, and Adam's count of steps only."""
        is_fused = any(group.get("fused") for group in self.optimizer.param_groups)
        return is_fused and not all("step" in self.optimizer.state.get(p, ()) for p in self.parameters)


class StepEvidence:
    """Checks after each step of an optimizer that it did something. Torch's own optimizers always do."""

    def __init__(self) -> None:
        self._changes_versions: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()

    def snapshot(self, optimizer: "Optimizer") -> StepSnapshot:
        """Return a snapshot of an optimizer that is about to step."""
        # Within a TorchDispatchMode, such as a profiler of memory, operations on lists of tensors change no version.
        has_mode = torch._C._len_torch_dispatch_stack() > 0
        visible = is_builtin(optimizer) or (self._changes_versions.get(optimizer, False) and not has_mode)
        return StepSnapshot(optimizer, with_values=not visible)

    def moved(self, before: StepSnapshot, *, grad_norm: float) -> bool:
        """Return whether the step changed anything, or had no reason to.

        Args:
            before: The snapshot of the optimizer before its step.
            grad_norm: 2-norm of the gradient. A step of zero gradients or a learning rate of 0 may change nothing; so
                may an optimizer that only reads gradients: without learning rate, or into an attribute of its own.
        """
        if is_builtin(before.optimizer) or not before.parameters:
            return True
        if before.versions_changed or before.state_changed:
            self._changes_versions[before.optimizer] = before.changes_are_visible
            return True
        rates = [float(group["lr"]) for group in before.optimizer.param_groups if "lr" in group]
        return before.values_changed or before.attributes_changed or grad_norm == 0.0 or not any(rates)


def is_builtin(optimizer: "Optimizer") -> bool:
    """Return whether an optimizer is exactly one of torch's."""
    return type(optimizer).__module__.startswith("torch.optim.")


def _state_token(optimizer: "Optimizer", parameters: Sequence[Tensor]) -> list[Any]:
    """Return values that differ if the state or the settings of an optimizer changed."""
    token: list[Any] = []
    for parameter in parameters if not is_builtin(optimizer) else _first_changed(parameters):
        if state := optimizer.state.get(parameter):
            token += [_version_or_value(value) for value in state.values()]
    if is_builtin(optimizer):  # its step changes no setting
        return token
    token += [
        [(name, _version_or_value(value)) for name, value in group.items() if name != "params"]
        for group in optimizer.param_groups
    ]
    return token


def _first_changed(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return parameters whose state torch's optimizers change before that of any other: the first of each kind."""
    return list({(p.dtype, p.device): p for p in reversed(parameters)}.values())


def _attributes(optimizer: "Optimizer") -> dict[str, int]:
    """Return the identities of attributes: not of numbers, which count the calls of an optimizer that skips some."""
    return {name: id(value) for name, value in vars(optimizer).items() if not isinstance(value, int | float)}


def _version_or_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value), value._version
    return value if isinstance(value, int | float | str | bool | None) else id(value)


def _checksums(parameters: Sequence[Tensor]) -> list[int]:
    """Return the sums of the bytes of each parameter, modulo 2^64. Waits for the device."""
    with torch.no_grad():
        sums = [_bytes(parameter).sum(dtype=torch.int64) for parameter in parameters]
        return [int(total) for total in sums]


def _bytes(parameter: Tensor) -> Tensor:
    local = getattr(parameter, "to_local", None)  # of a sharded parameter
    values = parameter.detach() if local is None else local().detach()
    return values.contiguous().view(-1).view(torch.uint8)
