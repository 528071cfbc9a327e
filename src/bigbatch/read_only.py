"""Attributes and settings that are set once, when an object is made: a later value would be ignored by its other parts.

@read_only("model", settings=("clip",))
class Engine:
    def __init__(self, model, clip):
        self.model, self.update = model, Update(clip)

engine.model = other    # AttributeError: Engine.model cannot be replaced ...
engine.clip = 2.0       # AttributeError: Engine.clip is a setting ...; it has no such attribute
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Kind = TypeVar("Kind", bound=type)


def read_only(*names: str, settings: Iterable[str] = ()) -> Callable[[Kind], Kind]:
    """Let the instances of a class assign some attributes only once, and others never.

    Args:
        names: Attributes.
        settings: Arguments of the constructor that are no attributes.

    Raises:
        AttributeError: By a second assignment, or by ``del``; and by any assignment to a setting.
    """

    def decorate(kind: Kind) -> Kind:
        for name in settings:
            setattr(kind, name, _Setting(name))
        for name in names:
            setattr(kind, name, _ReadOnly(name))
        return kind

    return decorate


class _Setting:
    """Refuses all values."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, owner: Any, kind: type) -> Any:
        raise AttributeError(f"{kind.__name__!r} object has no attribute {self._name!r}", name=self._name, obj=owner)

    def __set__(self, owner: Any, value: Any) -> None:
        kind = type(owner).__name__
        raise AttributeError(
            f"{kind}.{self._name} is a setting of {kind}({self._name}=...), and a later value would be ignored. Make "
            f"another {kind}, and load the state of this one if it has been trained.",
            name=self._name,
            obj=owner,
        )


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
