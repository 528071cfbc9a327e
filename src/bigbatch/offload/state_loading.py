"""Load the state dict of an optimizer into host memory, where its own ``load_state_dict`` copies it to the device."""

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import finalize

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.optim import Optimizer


def load_into_host_memory(optimizer: "Optimizer", dtype_of: Callable[[Tensor], torch.dtype], *, owner: object) -> None:
    """Let ``load_state_dict`` of an optimizer leave tensors, scalars excepted, in host memory while an owner lives.

    Dtypes become those that it converts to, and tensors are copies, as of the method itself.

    Args:
        optimizer: Its method is hooked.
        dtype_of: Returns the dtype in which the optimizer sees a parameter.
        owner: An object.
    """
    loading = _Loading(dtype_of)
    handles = [
        optimizer.register_load_state_dict_pre_hook(loading.before),
        optimizer.register_load_state_dict_post_hook(loading.after),
    ]
    for handle in handles:
        finalize(owner, handle.remove).atexit = False


class _Loading:
    def __init__(self, dtype_of: Callable[[Tensor], torch.dtype]) -> None:
        self._dtype_of = dtype_of
        self._incoming: list[dict[str, Tensor]] = []  # for each parameter, what is kept back

    def before(self, _optimizer: "Optimizer", state_dict: dict[str, Any]) -> dict[str, Any]:
        """Keep the tensors back."""
        entries = state_dict["state"]
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        self._incoming = [_tensors_of(entries.get(key)) for key in keys]
        rest = {key: _rest_of(entry) for key, entry in entries.items()}
        return {**state_dict, "state": rest}

    def after(self, optimizer: "Optimizer") -> None:
        """Put copies of them into the state that was loaded."""
        incoming, self._incoming = self._incoming, []
        parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        for parameter, entry in zip(parameters, incoming, strict=True):
            for name, value in entry.items():
                dtype = self._dtype_of(parameter) if parameter.is_floating_point() else value.dtype
                optimizer.state[parameter][name] = value.detach().to("cpu", dtype, copy=True)


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _tensors_of(entry: Any) -> dict[str, Tensor]:
    """Return what is kept back, and the scalars that are converted: those other than counts of steps."""
    if not isinstance(entry, dict):
        return {}
    return {name: value for name, value in entry.items() if isinstance(value, Tensor) and name != "step"}


def _rest_of(entry: Any) -> Any:
    return {n: value for n, value in entry.items() if not _is_large(value)} if isinstance(entry, dict) else entry
