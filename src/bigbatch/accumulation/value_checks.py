"""Checks of plain values and tensors of a captured state; each names the place of the first value that is wrong."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# Keys that PyTorch adds to states of schedulers in some versions; no learning rate depends on them.
_TRANSIENT = frozenset({"_is_initial", "_get_lr_called_within_step"})
_VERSION_KEYS = _TRANSIENT | {"verbose"}


def damaged(place: str, problem: str) -> ValueError:
    """Return the error for a value that no captured state has.

    Args:
        place: Path of the value, such as ``optimizer.param_groups.0.lr``.
        problem: What is wrong with it, as the end of a sentence that starts with the place.
    """
    return ValueError(
        f"the state is damaged: {place} {problem}. Load a state as Engine.state_dict() returned it; nothing is changed."
    )


def describe(value: Any) -> str:
    """Return a value as messages show it: tensors by dtype and shape, text cut to 40 characters."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of the shape {list(value.shape)}"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:37] + "...")
    return f"a {type(value).__name__}"


def check_mapping(place: str, value: Any) -> Mapping[Any, Any]:
    """Return a value that must be a mapping."""
    if not isinstance(value, Mapping):
        raise damaged(place, f"is {describe(value)}, not a dictionary")
    return value


def check_keys(place: str, value: Any, required: Iterable[str], *, optional: Iterable[str] = ()) -> Mapping[str, Any]:
    """Return a value that must be a mapping with these keys and no others."""
    found = check_mapping(place, value)
    required = list(required)
    if missing := [key for key in required if key not in found]:
        raise damaged(place, f"lacks {', '.join(missing)}")
    if foreign := [key for key in found if key not in {*required, *optional}]:
        raise damaged(place, f"has the unknown {'keys' if len(foreign) > 1 else 'key'} {', '.join(map(str, foreign))}")
    return found


def check_list(place: str, value: Any) -> list[Any] | tuple[Any, ...]:
    """Return a value that must be a list or a tuple."""
    if not isinstance(value, list | tuple):
        raise damaged(place, f"is {describe(value)}, not a list")
    return value


def check_number(place: str, value: Any, *, at_least: float = -math.inf) -> float:
    """Return a value that must be a real number, or a 0-d tensor of one; NaN is none."""
    if isinstance(value, Tensor) and not value.is_complex() and not value.is_meta and value.shape == ():
        value = value.item()  # waits for the device; only when a state is loaded
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise damaged(place, f"is {describe(value)}, not a number")
    if value < at_least:
        raise damaged(place, f"is {value}, and cannot be below {at_least:g}")
    return value


def check_whole(place: str, value: Any, *, at_least: int = 0) -> int:
    """Return a value that must be an int of at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise damaged(place, f"is {describe(value)}, not a whole number")
    if value < at_least:
        raise damaged(place, f"is {value}, and cannot be below {at_least}")
    return value


def check_tensor(place: str, value: Any, own: Tensor) -> Tensor:
    """Return a value that must be a tensor of the shape and kind (real, whole, complex, boolean) of another one."""
    if not isinstance(value, Tensor):
        raise damaged(place, f"is {describe(value)}, not a tensor")
    if value.is_meta and not own.is_meta:
        raise damaged(place, "is a tensor without data, on the meta device")
    if value.layout != own.layout:
        raise damaged(place, f"is a tensor with the layout {value.layout}, not {own.layout}")
    if value.shape != own.shape:
        raise ValueError(f"{place} has the shape {list(value.shape)} in the state, not {list(own.shape)}.")
    if _kind(value) != _kind(own):
        raise ValueError(f"{place} is {_kind(value)} in the state, not {_kind(own)}: no value can be converted.")
    return value


def _kind(tensor: Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "bool"
    if tensor.is_complex():
        return "complex"
    return "floating point" if tensor.is_floating_point() else "integer"


def check_same_kind(place: str, own: Any, found: Any, *, may_be_none: bool = False) -> None:
    """Check a value of settings or progress against the value of the object that will load it.

    Numbers match numbers, text matches text, and lists have the same length; values may differ. None matches
    everything that is plain, in the object that loads, and in the state with ``may_be_none``.
    """
    if own is None or (found is None and may_be_none):
        return
    if isinstance(own, bool):
        if not isinstance(found, bool):
            raise damaged(place, f"is {describe(found)}, not a bool")
    elif isinstance(own, int | float) or (isinstance(own, Tensor) and not own.ndim):
        if isinstance(own, Tensor) or not math.isnan(own):
            check_number(place, found)
    elif isinstance(own, str):
        if not isinstance(found, str):
            raise damaged(place, f"is {describe(found)}, not text")
    elif isinstance(own, Tensor):
        check_tensor(place, found, own)
    elif isinstance(own, Mapping):
        _check_same_mapping(place, own, found, may_be_none=may_be_none)
    elif isinstance(own, list | tuple):
        values = check_list(place, found)
        if len(values) != len(own):
            raise damaged(place, f"has {len(values)} entries, not {len(own)}")
        for index, (one, other) in enumerate(zip(own, values, strict=True)):
            check_same_kind(f"{place}.{index}", one, other, may_be_none=may_be_none)


def _check_same_mapping(place: str, own: Mapping[Any, Any], found: Any, *, may_be_none: bool) -> None:
    values = check_mapping(place, found)
    if isinstance(own, Counter) or (
        own and all(isinstance(key, int) for key in own)
    ):  # a table by number, such as the milestones of MultiStepLR
        for key, value in values.items():
            check_whole(f"{place} (a key)", key)
            check_number(f"{place}.{key}", value)
        return
    if missing := [str(key) for key in own if key not in values and key not in _VERSION_KEYS]:
        raise damaged(place, f"lacks {', '.join(missing)}")
    foreign = [str(key) for key in values if key not in own and not str(key).startswith("_") and key != "verbose"]
    if foreign:
        raise damaged(place, f"has the unknown {'keys' if len(foreign) > 1 else 'key'} {', '.join(foreign)}")
    for key, value in own.items():
        if key in _TRANSIENT and values.get(key, value) is not value:
            raise damaged(f"{place}.{key}", f"is {describe(values[key])}, and is {value} between steps")
        if key in values:
            check_same_kind(f"{place}.{key}", value, values[key], may_be_none=may_be_none)
