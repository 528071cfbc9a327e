"""State of modules that a forward may change: buffers, and tensors and numbers that are plain attributes."""

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor, nn

_Value: TypeAlias = Tensor | int | float
_Saved: TypeAlias = dict[str, tuple[_Value, _Value]]  # the value itself, and its copy


class ModuleState:
    """A copy of the buffers and attributes of some modules, to start every forward from the same state.

    Args:
        modules: Modules with their names, submodules not included.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self._modules = dict(modules)
        self._saved = {name: _copies(module) for name, module in self._modules.items()}

    def restore(self) -> None:
        """Write the copies back, in place where a tensor is still the same."""
        for name, module in self._modules.items():
            _restore(module, self._saved[name])

    def changed(self) -> dict[str, tuple[nn.Module, list[str]]]:
        """Return the modules whose state is not that of the copy, by name, with the names of what changed."""
        found = {}
        for name, module in self._modules.items():
            now = _values(module)
            names = [key for key, (_, copy) in self._saved[name].items() if not _same(now.get(key), copy)]
            if names:
                found[name] = module, names
        return found

    def of(self, names: Iterable[str]) -> "ModuleState":
        """Return the state of some of the modules, by their names."""
        part = ModuleState(())
        part._modules = {name: self._modules[name] for name in names}
        part._saved = {name: self._saved[name] for name in part._modules}
        return part


def _values(module: nn.Module) -> dict[str, _Value]:
    """Return buffers and attributes; tensors that require a gradient are outputs, not state."""
    found: dict[str, _Value] = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    for name, value in vars(module).items():
        is_tensor = isinstance(value, Tensor) and not value.requires_grad
        if is_tensor or (type(value) in (int, float)):
            found[name] = value
    return found


def _copies(module: nn.Module) -> _Saved:
    return {
        name: (value, value.detach().clone() if isinstance(value, Tensor) else value)
        for name, value in _values(module).items()
    }


def _restore(module: nn.Module, saved: _Saved) -> None:
    for name, (value, copy) in saved.items():
        if isinstance(value, Tensor) and isinstance(copy, Tensor) and not _same(value, copy):
            with torch.no_grad():
                value.copy_(copy)
        where = module._buffers if name in module._buffers else vars(module)
        if where.get(name) is not value:
            where[name] = value  # type: ignore[assignment]


def _same(value: _Value | None, copy: _Value) -> bool:
    if isinstance(value, Tensor) and isinstance(copy, Tensor):
        return value.shape == copy.shape and torch.equal(value.detach(), copy)
    return type(value) is type(copy) and bool(value == copy)
