"""Find the modules that a loss function uses in addition to the model that it is passed."""

from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

MAX_ELEMENTS = 1000  # of a list or dict that is searched: a longer one holds data


def modules_used_by(function: Callable[..., Any]) -> list[nn.Module]:
    """Return the modules that a function refers to, without their submodules.

    Searches closures, default arguments, global variables by the names in the code, arguments of `functools.partial`,
    the object of a bound method, the attributes of a callable object, and lists, tuples and dicts in these. Functions
    that are found are searched in the same way.
    """
    found: list[nn.Module] = []
    seen: dict[int, Any] = {}
    pending: list[Any] = [function, *_attributes(function)]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            found.append(value)
        else:
            pending += [part for part in _parts(value) if isinstance(part, _SEARCHED)]
    return found


def _parts(value: Any) -> Iterator[Any]:
    """Yield the values that a function or a container refers to."""
    if isinstance(value, FunctionType):
        yield from _variables(value)
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__, *_attributes(value.__self__))
    elif isinstance(value, partial):
        yield from (value.func, *_attributes(value.func), *value.args, *value.keywords.values())
    elif isinstance(value, list | tuple | dict) and len(value) <= MAX_ELEMENTS:
        yield from value.values() if isinstance(value, dict) else value


def _attributes(value: Any) -> list[Any]:
    """Return the attributes of a callable object, and its method that is called."""
    if isinstance(value, nn.Module | FunctionType | MethodType | partial | type):
        return []
    method = getattr(type(value), "__call__", None)  # noqa: B004 - it is searched, not called
    return [method, *getattr(value, "__dict__", {}).values()]


def _variables(function: FunctionType) -> Iterator[Any]:
    """Yield the values of the variables of a function that are not local to it."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # the variable is not assigned yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for name in _names(function.__code__):
        yield function.__globals__.get(name)


def _names(code: CodeType) -> Iterator[str]:
    """Yield the global names and attributes that a function and the functions defined inside it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


_SEARCHED = (nn.Module, FunctionType, MethodType, partial, list, tuple, dict)
