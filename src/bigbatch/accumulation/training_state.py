"""State of a run between two windows: everything that its next windows depend on, except their data.

capture(model, update, …) → a dictionary of tensors and plain values → restore(model, update, dictionary, …)
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bigbatch.accumulation.optimizer_update import OptimizerUpdate, optimizer_parameters
from bigbatch.rng import random_states, set_random_states

if TYPE_CHECKING:
    from torch.optim import Optimizer


def capture(
    module: nn.Module, update: OptimizerUpdate, progress: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """Collect the state of a run between two windows; tensors are those in use, not copies.

    Args:
        module: The model, without its wrapper.
        update: Its optimizer, scheduler and scaler.
        progress: Plain values that the next windows depend on; stored as they are.
        device: Whose random state is captured, with those of the host.

    Returns:
        ``model`` (trained parameters and persistent buffers by name, each once), ``optimizer``, ``scheduler`` and
        ``scaler`` (None without one), ``engine`` (the number of updates and ``progress``) and ``random``.
    """
    return {
        "model": dict(trainable_tensors(module)),
        "optimizer": _one_or_list([optimizer.state_dict() for optimizer in update.optimizers]),
        "scheduler": _one_or_list([scheduler.state_dict() for scheduler in update.schedulers]),
        "scaler": None if update.scaler is None else update.scaler.state_dict(),
        "engine": {"num_steps": update.num_steps, **progress},
        "random": random_states([device]),
    }


def restore(
    module: nn.Module, update: OptimizerUpdate, state: Mapping[str, Any], device: torch.device
) -> Mapping[str, Any]:
    """Load a state from `capture` into a model and an optimizer of the same settings; return its ``progress``.

    Raises:
        ValueError: It is the state of another model, optimizer, scheduler or scaler; nothing is changed then.
    """
    own = dict(trainable_tensors(module))
    _check_tensors(own, state["model"])
    optimizer_states, scheduler_states = _as_list(state["optimizer"]), _as_list(state["scheduler"])
    for kind, parts, states in (
        ("optimizers", update.optimizers, optimizer_states),
        ("schedulers", update.schedulers, scheduler_states),
    ):
        if len(parts) > 1 and states and len(parts) != len(states):
            raise ValueError(f"the state is of {len(states)} {kind}, and this engine has {len(parts)}: use as many.")
    for optimizer, optimizer_state in zip(update.optimizers, optimizer_states, strict=True):
        _check_groups(optimizer, optimizer_state)
    for name, part in (("scheduler", update.schedulers or None), ("scaler", update.scaler)):
        if (part is None) != (state[name] is None):
            has, had = ("no", "one") if part is None else ("a", "none")
            raise ValueError(
                f"this engine has {has} {name}, and the state is of one with {had}: use the same settings."
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(shard_like(tensor, state["model"][name]))
    for optimizer, optimizer_state in zip(update.optimizers, optimizer_states, strict=True):
        optimizer.load_state_dict(_shard_optimizer_state(optimizer, optimizer_state))
        _detach_from_input(optimizer, optimizer_state)
    for scheduler, scheduler_state in zip(update.schedulers, scheduler_states, strict=True):
        scheduler.load_state_dict(scheduler_state)
    if update.scaler is not None:
        update.scaler.load_state_dict(state["scaler"])
    update.set_num_steps(state["engine"]["num_steps"])
    set_random_states(state["random"], [device])
    return dict(state["engine"])


def _one_or_list(states: list[dict[str, Any]]) -> Any:
    """Return the only state, a list of several, or None for none."""
    return states if len(states) > 1 else states[0] if states else None


def _as_list(states: Any) -> list[dict[str, Any]]:
    return [] if states is None else states if isinstance(states, list) else [states]


def shard_like(own: Tensor, found: Tensor) -> Tensor:
    """Return the shard of a whole tensor that a local tensor is; every rank has the whole, so nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(own, DTensor) or isinstance(found, DTensor):
        return found
    return distribute_tensor(found.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def _shard_optimizer_state(optimizer: "Optimizer", state: Mapping[str, Any]) -> dict[str, Any]:
    """Shard the states of sharded parameters, in the form of ``Optimizer.state_dict``."""
    parameters = optimizer_parameters(optimizer)
    values = {
        index: {
            name: shard_like(parameters[index], value)
            if isinstance(value, Tensor) and value.shape == parameters[index].shape and value.ndim
            else value
            for name, value in of_parameter.items()
        }
        for index, of_parameter in state["state"].items()
    }
    return {**state, "state": values}


def _detach_from_input(optimizer: "Optimizer", given: Mapping[str, Any]) -> None:
    """Copy the tensors that torch did not copy: the next step would write to those of the caller."""
    theirs = {id(value) for values in given["state"].values() for value in values.values()}
    for values in optimizer.state.values():
        values.update({k: v.clone() for k, v in values.items() if isinstance(v, Tensor) and id(v) in theirs})


def trainable_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the trainable parameters and the persistent buffers of a model, each once, by name."""
    saved = model.state_dict(keep_vars=True)
    named = [*model.named_parameters(), *((name, b) for name, b in model.named_buffers() if name in saved)]
    return [(name, t.detach()) for name, t in named if t.requires_grad or not isinstance(t, nn.Parameter)]


def _check_groups(optimizer: "Optimizer", found: Mapping[str, Any]) -> None:
    own, theirs = (
        [len(group["params"]) for group in groups] for groups in (optimizer.param_groups, found["param_groups"])
    )
    if own != theirs:
        raise ValueError(
            f"the state is of an optimizer with groups of {theirs} parameters, and this one has {own}: use the same "
            "groups."
        )


def _check_tensors(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    if missing := own.keys() - found.keys():
        raise ValueError(f"the state lacks {len(missing)} tensors of this model, such as {min(missing)}.")
    if foreign := found.keys() - own.keys():
        raise ValueError(f"the state has {len(foreign)} tensors that this model lacks, such as {min(foreign)}.")
    for name, tensor in own.items():
        if tensor.shape != found[name].shape:
            raise ValueError(f"{name} has the shape {list(found[name].shape)} in the state, not {list(tensor.shape)}.")
