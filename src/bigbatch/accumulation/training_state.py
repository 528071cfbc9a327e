"""State of a run between two windows: everything that its next windows depend on, except their data.

capture → a dictionary of tensors and plain values → every part checked → all of it loaded, or none
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from bigbatch.accumulation.optimizer_update import OptimizerUpdate, optimizer_parameters
from bigbatch.accumulation.state_checks import (
    FORMAT,
    StateFormat,
    check_model,
    check_top_level,
    check_updaters,
    class_name,
    one_or_list,
)
from bigbatch.accumulation.state_rollback import all_or_nothing, copied, local_tensor
from bigbatch.accumulation.state_tensors import StateTensors
from bigbatch.accumulation.value_checks import check_keys, check_whole
from bigbatch.errors import first_line
from bigbatch.rng import check_random_states, random_states, set_random_states

if TYPE_CHECKING:
    from torch.optim import Optimizer


class Progress(Protocol):
    """Plain values that the next windows depend on, besides model, optimizer and random states.

    Attributes:
        optional_keys: Keys that a state may lack, or have in addition; ``check_state_dict`` decides about them.
    """

    @property
    def optional_keys(self) -> set[str]: ...  # noqa: D102 - as above

    def state_dict(self) -> dict[str, Any]:
        """Return the values by name."""

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if `load_state_dict` does not accept a state; change nothing."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict` that was checked."""


class TrainingState:
    """Captures and restores the state of a run.

    `StateTensors` says which tensors belong to it.

    Args:
        module: The model, without its wrapper.
        update: Its optimizers, schedulers and scaler.
        loss_fn: Computes the loss.
    """

    def __init__(self, module: nn.Module, update: OptimizerUpdate, *, loss_fn: object = None) -> None:
        self._update = update
        self._tensors = StateTensors(module, update, loss_fn)

    def capture(self, progress: Progress, device: torch.device) -> dict[str, Any]:
        """Collect the state of a run between two windows; tensors are those in use, not copies.

        Args:
            progress: Stored with the number of updates.
            device: Whose random state is captured, with those of the host.

        Returns:
            ``model`` (tensors by name), ``optimizer``, ``scheduler`` and ``scaler`` (None without one, a list for
            several), ``engine`` (the number of updates and ``progress``), ``random``, and ``format``: the classes of
            optimizers, schedulers and scaler, and the names of each optimizer's parameters in order.

        Raises:
            TornUpdateError: The last update is torn: its state is not to be saved.
            WindowStateError: A window holds gradients.
        """
        update = self._update
        update.steps.check_not_torn()
        update.steps.check_between_windows("state_dict")
        if update.offload is not None:
            update.offload.check_unwritten()
        self._tensors.note_trained()
        return {
            "model": {name: self._whole(tensor).detach() for name, tensor in self._tensors.belonging().items()},
            "optimizer": one_or_list([_optimizer_state(optimizer) for optimizer in update.optimizers]),
            "scheduler": one_or_list([scheduler.state_dict() for scheduler in update.schedulers]),
            "scaler": None if update.scaler is None else update.scaler.state_dict(),
            "engine": {"num_steps": update.num_steps, **progress.state_dict()},
            "random": random_states([device]),
            "format": {
                "version": FORMAT,
                "optimizers": [class_name(optimizer) for optimizer in update.optimizers],
                "schedulers": [class_name(scheduler) for scheduler in update.schedulers],
                "scaler": None if update.scaler is None else class_name(update.scaler),
                "parameters": self._tensors.parameter_names(),
            },
        }

    def restore(self, state: Any, progress: Progress, device: torch.device) -> None:
        """Load a state from `capture` into a model and optimizers of the same kind: all of it, or nothing.

        Needs host memory for one copy of the tensors in ``model`` until all is loaded.

        Args:
            state: As `capture` returned it; not changed.
            progress: Loads its part.
            device: As for `capture`.

        Raises:
            ValueError: It is the state of another model, optimizer, scheduler or scaler, of a newer version of
                bigbatch, or damaged.
            WindowStateError: A window holds gradients.
        """
        update = self._update
        update.steps.check_between_windows("load_state_dict")
        state = check_top_level(state)
        of = StateFormat(state)
        required = self._tensors.required(of_old_state=of.is_old)
        tensors = check_model(self._tensors.named(), required, state["model"])
        names = self._tensors.parameter_names()
        optimizer_states = check_updaters(update, names, state, of)
        own = {"num_steps": update.num_steps, **progress.state_dict()}
        added = {"noise"} if of.is_old else set()
        added |= progress.optional_keys
        found = check_keys("engine", state["engine"], own.keys() - added, optional=added)
        check_whole("engine.num_steps", found["num_steps"])
        progress.check_state_dict(found)
        check_random_states(state["random"], [device])
        whole = {name: self._whole(tensor) for name, tensor in tensors.items()}
        to_write = {n: t for n, t in whole.items() if not _shares_memory(t, state["model"][n])}
        with self._refreshed(), all_or_nothing(update, list(to_write.values()), device):
            for optimizer, optimizer_state, own_names in zip(update.optimizers, optimizer_states, names, strict=True):
                _load(optimizer, _shard_optimizer_state(optimizer, optimizer_state))
                _restore_dtypes(optimizer, optimizer_state, [state["model"].get(name) for name in own_names])
                _detach_from_input(optimizer, optimizer_state)
            for part, part_state in self._other_parts(state):
                _load(part, copied(part_state))
            with torch.no_grad():
                for name, tensor in to_write.items():
                    tensor.copy_(shard_like(tensor, state["model"][name]))
            set_random_states(state["random"], [device])
            update.set_num_steps(found["num_steps"])
            progress.load_state_dict(found)
        self._tensors.note_trained(name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter))

    def _whole(self, tensor: Tensor) -> Tensor:
        """Return the float32 value of a weight that is bfloat16 on the device; any other tensor itself."""
        offload = self._update.offload
        return tensor if offload is None else offload.whole(tensor)

    @contextmanager
    def _refreshed(self) -> Iterator[None]:
        """Write such weights again at the end, whether their values were loaded or put back."""
        try:
            yield
        finally:
            if self._update.offload is not None:
                self._update.offload.refresh()

    def _other_parts(self, state: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
        schedulers = self._update.schedulers
        states = [state["scheduler"]] if len(schedulers) == 1 else state["scheduler"]
        yield from zip(schedulers, states or (), strict=True)
        if self._update.scaler is not None:
            yield self._update.scaler, state["scaler"]


def shard_like(own: Tensor, found: Tensor) -> Tensor:
    """Return the shard of a whole tensor that a local tensor is; every rank has the whole, so nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(own, DTensor) or isinstance(found, DTensor):
        return found
    return distribute_tensor(found.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def _shares_memory(own: Tensor, found: Tensor) -> bool:
    """Whether a tensor of the state is that of the engine: nothing is to be copied then."""
    one, other = local_tensor(own), local_tensor(found)
    same_view = one.shape == other.shape and one.stride() == other.stride() and one.dtype == other.dtype
    return same_view and one.device == other.device and one.data_ptr() == other.data_ptr()


def _optimizer_state(optimizer: "Optimizer") -> dict[str, Any]:
    """Return the state of an optimizer without empty entries, which reading ``optimizer.state[parameter]`` makes."""
    state = optimizer.state_dict()
    return {**state, "state": {key: entry for key, entry in state["state"].items() if entry != {}}}


def _load(part: Any, state: Any) -> None:
    """Load the state of an optimizer, scheduler or scaler.

    Raises:
        ValueError: Its ``load_state_dict`` does not accept the state.
    """
    try:
        part.load_state_dict(state)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"{type(part).__name__} cannot load its state ({reason}). Nothing is changed: use the class and the "
            "settings that the state was captured with."
        ) from error


def _shard_optimizer_state(optimizer: "Optimizer", state: Mapping[str, Any]) -> dict[str, Any]:
    """Shard the states of sharded parameters, in the form of ``Optimizer.state_dict``."""
    parameters = optimizer_parameters(optimizer)
    values = {}
    for key, entry in state["state"].items():
        if not isinstance(key, int):  # of the optimizer itself
            values[key] = entry
            continue
        shape = parameters[key].shape
        values[key] = {
            name: shard_like(parameters[key], value)
            if isinstance(value, Tensor) and value.shape == shape and value.ndim
            else value
            for name, value in entry.items()
        }
    return {**state, "state": values}


def _restore_dtypes(optimizer: "Optimizer", given: Mapping[str, Any], weights: Sequence[Tensor | None]) -> None:
    """Undo the conversion of states to the dtype of their parameters, such as of NAdam's float32 product to bfloat16.

    Args:
        optimizer: Has loaded its state.
        given: The state.
        weights: The parameters in the state; of one with another dtype now, states stay converted.
    """
    for index, (parameter, weight) in enumerate(zip(optimizer_parameters(optimizer), weights, strict=True)):
        if weight is None or weight.dtype != parameter.dtype:
            continue
        loaded = optimizer.state.get(parameter, {})
        for name, value in given["state"].get(index, {}).items():
            now = loaded.get(name)
            if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                loaded[name] = shard_like(now, value.to(now.device, copy=True))


def _detach_from_input(optimizer: "Optimizer", given: Mapping[str, Any]) -> None:
    """Copy the tensors that torch did not copy: the next step would write to those of the caller."""
    entries = [entry for entry in given["state"].values() if isinstance(entry, Mapping)]
    theirs = {id(value) for entry in entries for value in entry.values()}
    for values in optimizer.state.values():
        if isinstance(values, dict):
            values.update({k: v.clone() for k, v in values.items() if isinstance(v, Tensor) and id(v) in theirs})
