"""Names of a package that are loaded when they are first used, so that importing the package is instant."""

import importlib
from collections.abc import Callable, Container, Mapping, MutableMapping
from typing import Any


def lazy_names(
    namespace: MutableMapping[str, Any], homes: Mapping[str, str], *, modules: Container[str] = ()
) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package.

    Hide it from type checkers, ``if not TYPE_CHECKING``: else they accept every name.

    Args:
        namespace: ``globals()`` of the package, where a loaded name stays.
        homes: The module of each name.
        modules: Submodules that are loaded the same way.
    """
    package = namespace["__name__"]

    def load(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")  # sets the attribute
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        namespace[name] = getattr(importlib.import_module(homes[name]), name)
        return namespace[name]

    return load
