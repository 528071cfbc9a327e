"""Checks of a captured state, part by part, before any of it is loaded."""

import copy
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bigbatch.accumulation.optimizer_state_checks import check_optimizer
from bigbatch.accumulation.value_checks import (
    check_keys,
    check_list,
    check_mapping,
    check_number,
    check_same_kind,
    check_tensor,
    check_whole,
    damaged,
    describe,
)
from bigbatch.errors import first_line

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from bigbatch.accumulation.optimizer_update import OptimizerUpdate

FORMAT = 2  # of captured states; the first one, of bigbatch 0.1.0, had no "format"
# Smallest values of settings and progress of torch's schedulers.
_SMALLEST = {
    "T_max": 1,
    "T_0": 1,
    "T_i": 1,
    "T_mult": 1,
    "step_size": 1,
    "total_iters": 0,
    "total_steps": 1,
    "total_size": 1,
}
_SMALLEST |= dict.fromkeys(
    ("base_lrs", "max_lrs", "_last_lr", "eta_min", "_step_count", "_milestones", "step_ratio"), 0
)
PARTS = ("model", "optimizer", "scheduler", "scaler", "engine", "random")


def class_name(part: object) -> str:
    """Return the qualified name of an object's class, as states have it."""
    return f"{type(part).__module__}.{type(part).__qualname__}"


def same_class(one: str, other: str) -> bool:
    """Compare qualified names: of the same class in the same package, or in a script that is run or imported."""
    packages = {name.partition(".")[0] for name in (one, other)}
    same_name = one.rpartition(".")[2] == other.rpartition(".")[2]
    return same_name and (len(packages) == 1 or "__main__" in packages)


def one_or_list(parts: Sequence[Any]) -> Any:
    """Return None for no part, the part itself for one, and a list for several."""
    return None if not parts else parts[0] if len(parts) == 1 else list(parts)


def check_top_level(state: Any) -> Mapping[str, Any]:
    """Return a state with all its parts and no others, of a format that this version knows."""
    found = check_mapping("it", state)
    written = found.get("format")
    if isinstance(written, Mapping):
        version = check_whole("format.version", written.get("version"), at_least=FORMAT)
        if version > FORMAT:
            raise ValueError(
                f"the state has the format {version}, and this version of bigbatch knows formats up to {FORMAT}: "
                "update bigbatch to the version that captured it."
            )
    if foreign := [str(key) for key in found if key not in (*PARTS, "format")]:
        raise ValueError(
            f"the state has the unknown {'keys' if len(foreign) > 1 else 'key'} {', '.join(foreign)}: remove what was "
            "added to it, or update bigbatch to the version that captured it."
        )
    return check_keys("it", state, PARTS, optional=("format",))


class StateFormat:
    """What a state says about the objects that it was captured from.

    Args:
        state: With all its parts; one without ``format`` has the names of no class and no parameter.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.is_old = "format" not in state
        if self.is_old:
            return
        keys = ("version", "optimizers", "schedulers", "scaler", "parameters")
        found = check_keys("format", state["format"], keys)
        self._classes = {name: [*check_list(f"format.{name}", found[name])] for name in ("optimizers", "schedulers")}
        self._classes["scaler"] = [] if found["scaler"] is None else [found["scaler"]]
        for name, classes in self._classes.items():
            for each in classes:
                if not isinstance(each, str):
                    raise damaged(f"format.{name}", f"has {describe(each)}, not the name of a class")
        self._parameters = check_list("format.parameters", found["parameters"])

    def check_classes(self, name: str, own: Sequence[object]) -> None:
        """Check that parts of the state are of the classes of these objects.

        Args:
            name: ``"optimizers"``, ``"schedulers"`` or ``"scaler"``.
            own: The objects of this engine.
        """
        if self.is_old:
            return
        found = self._classes[name]
        if len(found) != len(own):
            raise damaged(f"format.{name}", f"names {len(found)} classes for {len(own)} states")
        for theirs, mine in zip(found, own, strict=True):
            if not same_class(theirs, class_name(mine)):
                raise ValueError(
                    f"the {name.removesuffix('s')} in the state is {theirs}, and that of this engine is "
                    f"{class_name(mine)}: pass one of the same class."
                )

    def parameters(self, count: int) -> list[Sequence[str] | None]:
        """Return the names of the parameters of ``count`` optimizers, in order; None for each if they are not known."""
        if self.is_old:
            return [None] * count
        if len(self._parameters) != count:
            raise damaged("format.parameters", f"has {len(self._parameters)} entries, not {count}")
        return [check_list(f"format.parameters.{index}", names) for index, names in enumerate(self._parameters)]


def check_model(named: Mapping[str, Tensor], required: Iterable[str], found: Any) -> dict[str, Tensor]:
    """Check the tensors of a model; return those of this one that the state has a value for.

    Args:
        named: All tensors that a state may hold, by name.
        required: Names of those that the state must hold.
        found: Tensors of the state, by name.
    """
    values = check_mapping("model", found)
    if missing := set(required) - values.keys():
        raise ValueError(f"the state lacks {len(missing)} tensors of this model, such as {min(missing)}.")
    if foreign := sorted(str(name) for name in values if name not in named):
        raise ValueError(f"the state has {len(foreign)} tensors that this model lacks, such as {foreign[0]}.")
    for name, value in values.items():
        check_tensor(name, value, named[name])
    return {name: tensor for name, tensor in named.items() if name in values}


def check_updaters(
    update: "OptimizerUpdate", names: Sequence[Sequence[str]], state: Mapping[str, Any], of: StateFormat
) -> list[dict[str, Any]]:
    """Check the states of optimizers, schedulers and scaler; return those of the optimizers, completed.

    Args:
        update: Will load them; nothing of it is changed.
        names: Of the parameters of each optimizer, in order.
        state: With all its parts.
        of: What the state says about the objects that it was captured from.
    """
    optimizers = _check_number_of("optimizer", update.optimizers, state["optimizer"])
    schedulers = _check_number_of("scheduler", update.schedulers, state["scheduler"])
    scalers = () if update.scaler is None else (update.scaler,)
    scaler_states = _check_number_of("scaler", scalers, state["scaler"])
    of.check_classes("optimizers", update.optimizers)
    if update.schedulers:  # a state without one may be used to continue without
        of.check_classes("schedulers", update.schedulers)
    if scalers:
        of.check_classes("scaler", scalers)
    places = ["optimizer"] if len(optimizers) == 1 else [f"optimizer.{index}" for index in range(len(optimizers))]
    completed = [
        check_optimizer(place, own, found, names=mine, found_names=theirs)
        for place, own, found, mine, theirs in zip(
            places, update.optimizers, optimizers, names, of.parameters(len(optimizers)), strict=True
        )
    ]
    for index, (scheduler, found) in enumerate(zip(update.schedulers, schedulers, strict=True)):
        place = "scheduler" if len(schedulers) == 1 else f"scheduler.{index}"
        _check_scheduler(place, scheduler, found, update.optimizers, completed)
    for scaler, found in zip(scalers, scaler_states, strict=True):
        _check_scaler(scaler, found)
    return completed


def _check_number_of(name: str, own: Sequence[Any], found: Any) -> list[Any]:
    """Return the states of the optimizers, schedulers or scaler: as many as this engine has."""
    if found is not None and not isinstance(found, Mapping | list | tuple):
        raise damaged(name, f"is {describe(found)}, not a dictionary")
    states = [] if found is None else [found] if isinstance(found, Mapping) else list(found)
    if isinstance(found, list | tuple) and len(found) < 2:
        raise damaged(name, f"is a list of {len(found)}")
    if len(states) == len(own):
        return states
    if len(states) > 1 or len(own) > 1:
        raise ValueError(
            f"this engine has {len(own)} {name}s, and the state is of one with {len(states)}: use as many."
        )
    if name == "optimizer":
        raise damaged(name, "is None, not a dictionary")
    has, had = ("a", "none") if own else ("no", "one")
    raise ValueError(f"this engine has {has} {name}, and the state is of one with {had}: use the same settings.")


def _check_scheduler(
    place: str,
    scheduler: Any,
    found: Any,
    optimizers: Sequence["Optimizer"],
    completed: Sequence[Mapping[str, Any]],
) -> None:
    own = scheduler.state_dict()
    values, name = check_mapping(place, found), type(scheduler).__name__
    theirs, mine = ({str(key) for key in keys if not str(key).startswith("_")} - {"verbose"} for keys in (values, own))
    if theirs - mine:
        raise ValueError(
            f"the state is of a scheduler with the settings {', '.join(sorted(theirs))}, and the {name} of this engine "
            f"has {', '.join(sorted(mine))}: pass a scheduler of the same class."
        )
    is_of_torch = type(scheduler).__module__.startswith("torch.optim")
    check_same_kind(place, own, values, may_be_none=not is_of_torch)
    if is_of_torch:
        if "last_epoch" in values:
            check_whole(f"{place}.last_epoch", values["last_epoch"])
        _check_ranges(place, own, values)
        _repeat_last_step(place, scheduler, values, optimizers, completed)


def _check_ranges(place: str, own: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Check values that a step would accept, and that make no schedule."""
    for key, least in _SMALLEST.items():
        if key in found:
            for value in found[key] if isinstance(found[key], list | tuple) else [found[key]]:
                check_number(f"{place}.{key}", value, at_least=least)
    for index, (mine, phase) in enumerate(
        zip(own.get("_schedule_phases", ()), found.get("_schedule_phases", ()), strict=True)
    ):
        for key, value in mine.items():
            if isinstance(value, str) and phase[key] != value:
                raise damaged(f"{place}._schedule_phases.{index}.{key}", f"is {describe(phase[key])}, not {value!r}")
        check_number(f"{place}._schedule_phases.{index}.end_step", phase["end_step"], at_least=0)
    for index, (inner, values) in enumerate(zip(own.get("_schedulers", ()), found.get("_schedulers", ()), strict=True)):
        check_whole(f"{place}._schedulers.{index}.last_epoch", values.get("last_epoch", 0), at_least=-1)
        _check_ranges(f"{place}._schedulers.{index}", inner, values)


def _repeat_last_step(
    place: str,
    scheduler: Any,
    found: Mapping[str, Any],
    optimizers: Sequence["Optimizer"],
    completed: Sequence[Mapping[str, Any]],
) -> None:
    """Run the scheduler's last step again, with a copy of it: every scheduler can, even at the end of its schedule."""
    stand_ins: dict[int, Any] = {}
    for optimizer, state in zip(optimizers, completed, strict=True):
        groups = [{key: copy.deepcopy(value) for key, value in group.items()} for group in state["param_groups"]]
        stand_ins[id(optimizer)] = SimpleNamespace(param_groups=groups, step=None, _opt_called=True)
    own = getattr(scheduler, "optimizer", None)
    stand_in = stand_ins.setdefault(id(own), next(iter(stand_ins.values())))
    try:
        trial = copy.deepcopy(scheduler, dict(stand_ins))
    except (TypeError, RuntimeError):  # it holds what cannot be copied
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial.load_state_dict(_one_step_back(found))
            trial.step()
        rates = [float(group["lr"]) for group in stand_in.param_groups]
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise damaged(place, f"cannot be used by {type(scheduler).__name__} ({reason})") from error
    if not all(math.isfinite(rate) for rate in rates):
        raise damaged(place, f"makes learning rates of {', '.join(map(str, rates))}")


def _one_step_back(found: Mapping[str, Any]) -> dict[str, Any]:
    state = copy.deepcopy(dict(found))
    if isinstance(state.get("last_epoch"), int) and state["last_epoch"] > 0:
        state["last_epoch"] -= 1
    if isinstance(state.get("_schedulers"), list | tuple):
        state["_schedulers"] = [_one_step_back(each) for each in state["_schedulers"]]
    return state


def _check_scaler(scaler: Any, found: Any) -> None:
    own = scaler.state_dict()
    values = check_keys("scaler", found, own)
    check_same_kind("scaler", own, values)
    for key in ("scale", "growth_factor", "backoff_factor"):
        if key in values and not 0 < check_number(f"scaler.{key}", values[key]) < math.inf:
            raise damaged(f"scaler.{key}", f"is {values[key]}, and must be above 0 and finite")
    for key, least in (("growth_interval", 1), ("_growth_tracker", 0)):
        if key in values:
            check_whole(f"scaler.{key}", values[key], at_least=least)
