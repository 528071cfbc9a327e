"""Functions of the user that a trainer runs: which one raised an error, and how its training_step is called.

An error of a user's function is raised as `InputError` from it, so that the message names the function and the
traceback shows the line.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from bigbatch.errors import BigbatchError, InputError, first_line
from bigbatch.memory.usage import is_out_of_memory

_LIBRARIES = ("transformers", "trl", "bigbatch")


class OwnCode:
    """Notes which function of the user raised an error.

    Errors that say that memory ran out, and those of bigbatch, are never renamed: windows recover from the former.
    """

    def __init__(self) -> None:
        self._error: Exception | None = None
        self._name = ""

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """Note an error of the block as one of a function, such as ``"compute_loss of MyTrainer"``."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, BigbatchError) and not is_out_of_memory(error):  # would keep its tensors alive
                self._error, self._name = error, name
            raise

    @contextmanager
    def named(self) -> Iterator[None]:
        """Raise an error that a function raised in the block, or a ValueError of bigbatch, as InputError from it."""
        try:
            yield
        except Exception as error:
            if isinstance(error, BigbatchError) or is_out_of_memory(error):
                raise
            if error is self._error:
                raise raised_by(self._name, error) from error
            if isinstance(error, ValueError):
                raise InputError(str(error)) from error
            raise
        finally:
            self._error = None


def raised_by(name: str, error: Exception) -> InputError:
    """Return the error that names the function in which another one was raised."""
    text = first_line(error)
    kind = type(error).__name__
    what = kind if text == kind else f"{kind}: {text}"
    return InputError(f"{name} raised {what}. The traceback before this one shows where.")


def name_of(function: Any) -> str:
    """Return the name of a function, or of the class of a callable object."""
    return str(getattr(function, "__name__", type(function).__name__))


def own_training_step(trainer: Any) -> str | None:
    """Return the class of the user whose training_step computes and differentiates the loss; None for the library's.

    One that calls that of its base class leaves both to it.
    """
    for kind in type(trainer).__mro__:
        if kind.__module__.partition(".")[0] in _LIBRARIES:
            continue
        step = vars(kind).get("training_step")
        code = getattr(inspect.unwrap(step), "__code__", None) if step is not None else None
        if step is not None and (code is None or "training_step" not in code.co_names):
            return kind.__name__
    return None


def overrides_training_step(trainer: Any) -> bool:
    """Return whether a class of the user has a training_step."""
    return any(
        "training_step" in vars(kind) and kind.__module__.partition(".")[0] not in _LIBRARIES
        for kind in type(trainer).__mro__
    )


def call_training_step(step: Callable[..., Tensor], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Call a training_step; one of the older form, ``training_step(model, inputs)``, without the number of items."""
    try:
        inspect.signature(step).bind(model, inputs, *args, **kwargs)
    except TypeError:
        return step(model, inputs)
    return step(model, inputs, *args, **kwargs)
