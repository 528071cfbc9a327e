"""Checks of an optimizer's captured state, before any of it is loaded.

settings of each group → the state that such an optimizer keeps for each parameter → compared by name, shape and kind
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigbatch.accumulation.optimizer_state import expected_state
from bigbatch.accumulation.optimizer_update import optimizer_parameters
from bigbatch.accumulation.value_checks import (
    check_keys,
    check_list,
    check_mapping,
    check_number,
    check_same_kind,
    check_tensor,
    damaged,
    describe,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer

# How a step is computed, not what: states of other PyTorch versions may lack them.
_IMPLEMENTATION = frozenset({"foreach", "fused", "capturable", "differentiable", "maximize"})
_OF_VERSIONS = _IMPLEMENTATION | {"decoupled_weight_decay", "param_names"}
# Settings that a learning-rate scheduler adds to the groups.
_OF_SCHEDULERS = frozenset({"initial_lr", "swa_lr", "min_lr", "max_lr", "base_momentum", "max_momentum"})
# Buffers that a group keeps after momentum or amsgrad was turned off.
_UNUSED_BUFFERS = frozenset({"momentum_buffer", "grad_avg", "max_exp_avg_sq"})


def check_optimizer(
    place: str, optimizer: "Optimizer", found: Any, *, names: Sequence[str], found_names: Sequence[str] | None
) -> dict[str, Any]:
    """Check the state of an optimizer, and return it with every setting that its groups need.

    Args:
        place: Path of the state in messages.
        optimizer: Will load it; nothing of it is changed.
        found: In the form of ``Optimizer.state_dict``.
        names: Of its parameters, in order.
        found_names: Of the parameters that the state is of; None if the state was captured without names.

    Raises:
        ValueError: It is the state of another optimizer, or damaged.
    """
    own = optimizer.state_dict()
    check_keys(place, found, own)
    groups = _check_groups(f"{place}.param_groups", optimizer, own["param_groups"], found["param_groups"])
    if found_names is not None:
        _check_names(names, found_names)
    entries = check_mapping(f"{place}.state", found["state"])
    expected = expected_state(optimizer, groups)
    parameters = optimizer_parameters(optimizer)
    for key, entry in entries.items():
        where = f"{place}.state.{key}"
        if isinstance(key, int) and not isinstance(key, bool) and 0 <= key < len(parameters):
            values = check_mapping(where, entry)
            if not values and found_names is not None and expected[key] != {}:
                raise damaged(where, "is empty")
            if values:
                extra_allowed = not _is_of_torch(optimizer)
                _check_entry(where, values, expected[key], own["state"].get(key), parameters[key], extra_allowed)
        elif key not in own["state"]:
            raise damaged(f"{place}.state", f"has an entry {key!r}, and the parameters are 0 to {len(parameters) - 1}")
    if _has_state_from_the_start(optimizer) and (missing := own["state"].keys() - entries.keys()):
        raise damaged(f"{place}.state", f"lacks the entry {min(missing)}")
    return {**found, "param_groups": groups}


def _has_state_from_the_start(optimizer: "Optimizer") -> bool:
    """Whether the constructor creates the state, and a step requires it: Adagrad before torch 2.12."""
    return isinstance(optimizer, torch.optim.Adagrad) and bool(torch.optim.Adagrad([torch.zeros(1)]).state)


def _check_groups(
    place: str, optimizer: "Optimizer", own: Sequence[Mapping[str, Any]], found: Any
) -> list[dict[str, Any]]:
    groups = [check_mapping(f"{place}.{index}", group) for index, group in enumerate(check_list(place, found))]
    for index, group in enumerate(groups):
        check_list(f"{place}.{index}.params", group.get("params"))
    sizes, theirs = ([len(group["params"]) for group in some] for some in (own, groups))
    if sizes != theirs:
        raise ValueError(
            f"the state is of an optimizer with groups of {theirs} parameters, and this one has {sizes}: use the same "
            "groups."
        )
    return [
        _check_group(f"{place}.{index}", optimizer, mine, group)
        for index, (mine, group) in enumerate(zip(own, groups, strict=True))
    ]


def _check_names(own: Sequence[str], found: Sequence[str]) -> None:
    if len(found) != len(own):
        raise damaged("format.parameters", f"has {len(found)} names for {len(own)} parameters")
    for index, (name, theirs) in enumerate(zip(own, found, strict=True)):
        if not isinstance(theirs, str) or theirs != name:
            raise ValueError(
                f"parameter {index} of the optimizer is {theirs} in the state and {name} in this engine: make the "
                "optimizer with the same parameters in the same order."
            )


def _check_group(
    place: str, optimizer: "Optimizer", own: Mapping[str, Any], found: Mapping[str, Any]
) -> dict[str, Any]:
    missing = own.keys() - found.keys() - _OF_VERSIONS
    foreign = found.keys() - own.keys() - _OF_VERSIONS - _OF_SCHEDULERS
    if missing or foreign:
        raise ValueError(
            f"{place} has the settings {_listed(found)} in the state, and the {type(optimizer).__name__} of this "
            f"engine has {_listed(own)}: pass an optimizer of the same class, with groups of the same settings."
        )
    if any(type(each) is not int for each in found["params"]) or [*found["params"]] != [*own["params"]]:
        raise damaged(f"{place}.params", "does not number the parameters as the optimizer does")
    for key, value in own.items():
        if key == "params" or key not in found:
            continue
        if key in ("foreach", "fused"):
            if not (found[key] is None or isinstance(found[key], bool)):
                raise damaged(f"{place}.{key}", f"is {describe(found[key])}, not None or a bool")
            continue
        check_same_kind(f"{place}.{key}", value, found[key], may_be_none=isinstance(value, str))
        if key in _OF_SCHEDULERS or (key == "lr" and value >= 0):
            check_number(f"{place}.{key}", found[key], at_least=0)
    if found.get("capturable") and any(p.device.type == "cpu" for p in optimizer_parameters(optimizer)):
        raise damaged(f"{place}.capturable", "is True, which steps on the CPU do not support")
    for key in found.keys() - own.keys() - _OF_VERSIONS:
        check_number(f"{place}.{key}", found[key], at_least=0)
    if type(optimizer) is torch.optim.AdamW and not found.get("decoupled_weight_decay", True):
        raise ValueError(
            f"{place} has decoupled_weight_decay=False in the state, which is of Adam, and this engine has AdamW: pass "
            "an optimizer of the same class."
        )
    group = {**{key: value for key, value in own.items() if key not in found}, **found}
    _check_with_constructor(place, optimizer, group)
    return group


def _listed(group: Mapping[str, Any]) -> str:
    """Name the settings of a group that distinguish optimizers."""
    return ", ".join(sorted(str(key) for key in group.keys() - {"params"} - _OF_VERSIONS - _OF_SCHEDULERS))


def _check_with_constructor(place: str, optimizer: "Optimizer", group: Mapping[str, Any]) -> None:
    """Let the optimizer's own constructor check the range of the settings; only torch's have no side effects."""
    kind = type(optimizer)
    if not _is_of_torch(optimizer):
        return
    accepted = inspect.signature(kind).parameters.keys() - {"params", "capturable"}  # which not every device supports
    settings = {key: _plain(value) for key, value in group.items() if key in accepted}
    try:
        kind([torch.nn.Parameter(torch.zeros(1, 1))], **settings)
    except (ValueError, TypeError, RuntimeError) as error:
        raise damaged(place, f"is refused by {kind.__name__} ({error})") from error
    if kind is torch.optim.LBFGS and (group["max_iter"] != 1 or group["line_search_fn"] is not None):
        raise damaged(place, "has max_iter or line_search_fn of an LBFGS that evaluates the loss more than once")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_plain(each) for each in value)
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _is_of_torch(optimizer: "Optimizer") -> bool:
    return type(optimizer).__module__.startswith("torch.optim")


def _check_entry(
    place: str,
    found: Mapping[str, Any],
    expected: Mapping[str, Any] | None,
    own: Mapping[str, Any] | None,
    parameter: Tensor,
    extra_allowed: bool,
) -> None:
    """Check the state of one parameter: against the known one, or else against what the optimizer has already."""
    if expected is None:
        _check_unknown_entry(place, found, own or {}, parameter)
        return
    if missing := expected.keys() - found.keys():
        raise damaged(place, f"lacks {', '.join(sorted(missing))}")
    for name, value in found.items():
        where = f"{place}.{name}"
        if name in expected:
            _check_like(where, expected[name], value)
        elif value is not None and name in _UNUSED_BUFFERS:
            check_tensor(where, value, torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
        elif value is not None and not extra_allowed:
            raise damaged(place, f"has an unknown entry {name}")


def _check_like(place: str, own: Any, found: Any) -> None:
    if isinstance(own, Tensor) and own.ndim:
        if isinstance(found, Tensor) and found.is_meta:
            raise damaged(place, "is a tensor without data, on the meta device")
        check_tensor(place, found, own)
    elif isinstance(own, Tensor):
        check_number(place, found, at_least=0 if place.endswith(".step") else -torch.inf)
    else:
        check_same_kind(place, own, found)


def _check_unknown_entry(place: str, found: Mapping[str, Any], own: Mapping[str, Any], parameter: Tensor) -> None:
    """Check the state of an optimizer that is not known: values that this one has as well are of the same kind."""
    for name, value in found.items():
        where, mine = f"{place}.{name}", own.get(name)
        if isinstance(value, Tensor) and value.is_meta:
            raise damaged(where, "is a tensor without data, on the meta device")
        if isinstance(mine, Tensor) and mine.shape == parameter.shape and mine.ndim:
            check_tensor(where, value, mine)
        elif isinstance(mine, Tensor) and not mine.ndim:
            check_number(where, value)
        elif isinstance(mine, bool | int | float) and value is not None:
            check_same_kind(where, mine, value)
