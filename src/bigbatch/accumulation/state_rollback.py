"""Put a model, its optimizers and the random generators back to where they were if loading a state fails."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigbatch.rng import random_states, set_random_states

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from bigbatch.accumulation.optimizer_update import OptimizerUpdate


@contextmanager
def all_or_nothing(update: "OptimizerUpdate", tensors: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Undo what the block did if it raises, KeyboardInterrupt included.

    Tensors are copied to the host on entry. The optimizers' states are kept by reference: a ``load_state_dict`` that
    writes into existing tensors, as those of torch never do, cannot be undone.

    Args:
        update: Its optimizers, schedulers, scaler and count are put back.
        tensors: Values are put back, in place.
        device: Whose random state is put back, with those of the host.
    """
    local = [local_tensor(tensor.detach()) for tensor in tensors]
    copies = [tensor.to("cpu", copy=True) for tensor in local]
    optimizers = [_OptimizerBackup(each) for optimizer in update.optimizers for each in _unwrapped(optimizer)]
    others = [_ObjectBackup(each) for each in (*update.schedulers, update.scaler) if each is not None]
    num_steps, torn, random = update.num_steps, update.steps.torn, random_states([device])
    try:
        yield
    except BaseException:
        for optimizer in optimizers:
            optimizer.put_back()
        for other in others:
            other.put_back()
        with torch.no_grad():
            for tensor, value in zip(local, copies, strict=True):
                tensor.copy_(value)
        update.steps.reset(num_steps, torn=torn)
        set_random_states(random, [device])
        raise


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the shard of this rank, or the tensor itself if it is whole."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copied(state: Any) -> Any:
    """Return a deep copy of the state of a scheduler or scaler, or the state itself if it holds what has none."""
    try:
        return copy.deepcopy(state)
    except (TypeError, RuntimeError):
        return state


def _unwrapped(optimizer: Any) -> Iterator["Optimizer"]:
    """Yield an optimizer and those that it wraps."""
    while isinstance(optimizer, torch.optim.Optimizer):
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


class _OptimizerBackup:
    """References to the groups and the state of an optimizer, and to its attributes."""

    def __init__(self, optimizer: "Optimizer") -> None:
        self._attributes = vars(optimizer)
        self._values = dict(self._attributes)
        self._groups, self._state = optimizer.param_groups, optimizer.state
        self._group_values = [(group, dict(group)) for group in self._groups]
        self._entries = {key: (value, dict(value)) for key, value in self._state.items() if isinstance(value, dict)}
        self._others = {key: value for key, value in self._state.items() if not isinstance(value, dict)}

    def put_back(self) -> None:
        for group, values in self._group_values:
            _refill(group, values)
        self._groups[:] = [group for group, _ in self._group_values]
        for entry, values in self._entries.values():
            _refill(entry, values)
        _refill(self._state, {key: entry for key, (entry, _) in self._entries.items()} | self._others)
        _refill(self._attributes, self._values)


class _ObjectBackup:
    """The state and the attributes of a scheduler or scaler, and of the schedulers in it."""

    def __init__(self, part: Any) -> None:
        self._part = part
        self._state = copied(part.state_dict())
        inner = getattr(part, "_schedulers", ())
        self._attributes = [(vars(each), dict(vars(each))) for each in (part, *inner) if hasattr(each, "__dict__")]

    def put_back(self) -> None:
        with suppress(Exception):  # what it keeps outside of its attributes: tensors in place, callables with a state
            self._part.load_state_dict(self._state)
        for attributes, values in self._attributes:
            _refill(attributes, values)


def _refill(mapping: Any, values: Mapping[Any, Any]) -> None:
    mapping.clear()
    mapping.update(values)
