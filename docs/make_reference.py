"""Generate docs/reference/api.md from the docstrings of the public names.

python docs/make_reference.py            # tests/docs/test_reference.py fails if the file is out of date
"""

import dataclasses
import enum
import inspect
from pathlib import Path

import bigbatch

TARGET = Path(__file__).parent / "reference" / "api.md"


def reference() -> str:
    """Return the page: signature and docstring of each public name and of its public methods."""
    parts = ["# Reference\n\nGenerated from the docstrings by `python docs/make_reference.py`.\n"]
    for name in sorted(set(bigbatch.__all__) - {"__version__"}):
        thing = getattr(bigbatch, name)
        parts.append(_entry(f"## `bigbatch.{name}`", name, thing))
        if inspect.isclass(thing) and not issubclass(thing, Exception | enum.Enum):
            parts += [
                _entry(f"### `{name}.{member}`", member, value)
                for member, value in vars(thing).items()
                if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
            ]
    parts.append(_entry("## `bigbatch.losses`", "losses", bigbatch.losses))
    parts += [
        _entry(f"### `losses.{name}`", name, value)
        for name, value in vars(bigbatch.losses).items()
        if inspect.isfunction(value) and hasattr(value, "__wrapped__")
    ]
    return "\n".join(parts)


def _entry(heading: str, name: str, thing: object) -> str:
    docstring = inspect.getdoc(thing)
    if not docstring:
        raise SystemExit(f"{heading} has no docstring.")
    signature = (
        ""
        if isinstance(thing, property) or inspect.ismodule(thing) or _is_plain(thing)
        else f"{name}{_call(thing)}\n\n"
    )
    return f"{heading}\n\n```text\n{signature}{docstring}\n```\n"


def _call(thing: object) -> inspect.Signature:
    """Return the signature without types, which the docstrings describe in words."""
    signature = inspect.signature(thing)
    plain = [
        p.replace(annotation=p.empty, default=_Name(p.default.__name__) if inspect.isfunction(p.default) else p.default)
        for p in signature.parameters.values()
        if p.name != "self"
    ]
    return signature.replace(parameters=plain, return_annotation=signature.empty)


class _Name(str):
    """Prints as a name, without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _is_plain(thing: object) -> bool:
    """Return whether users do not call it: errors, enums and dataclasses that the package creates."""
    return inspect.isclass(thing) and (issubclass(thing, Exception | enum.Enum) or dataclasses.is_dataclass(thing))


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(reference(), encoding="utf-8")
