"""Attributes that are set once, when an object is made: a later value would be ignored by its other parts.

@read_only("model")
class Engine:
    def __init__(self, model):
        self.model = model

engine.model = other    # AttributeError: Engine.model cannot be replaced ...
"""

from collections.abc import Callable
from typing import Any, TypeVar

Kind = TypeVar("Kind", bound=type)


def read_only(*names: str) -> Callable[[Kind], Kind]:
    """Let the instances of a class assign some attributes only once.

    Raises:
        AttributeError: By a second assignment, or by ``del``.
    """

    def decorate(kind: Kind) -> Kind:
        for name in names:
            setattr(kind, name, _ReadOnly(name))
        return kind

    return decorate


class _ReadOnly:
    """Refuses a second value. Python reads the value from the ``__dict__`` of the object, at no cost."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __set__(self, owner: Any, value: Any) -> None:
        if self._name in vars(owner):
            raise self._refusal(owner)
        vars(owner)[self._name] = value

    def __delete__(self, owner: Any) -> None:
        raise self._refusal(owner)

    def _refusal(self, owner: Any) -> AttributeError:
        kind = type(owner).__name__
        return AttributeError(
            f"{kind}.{self._name} cannot be replaced: other parts of the {kind} keep the one that it was made with. "
            f"Make another {kind}, and load the state of this one if it has been trained.",
            name=self._name,
            obj=owner,
        )
