"""Generate docs/reference/api.md from the docstrings of the public names.

python docs/make_reference.py            # tests/docs/test_reference.py fails if the file is out of date
"""

import dataclasses
import enum
import inspect
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import bigbatch
import bigbatch.lm
from bigbatch.lm.config.field_groups import GROUPS

TARGET = Path(__file__).parent / "reference" / "api.md"
WIDTH = 120


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
    parts.append(_entry("## `bigbatch.lm`", "lm", bigbatch.lm))
    for name in bigbatch.lm.__all__:
        thing = getattr(bigbatch.lm, name)
        if thing is bigbatch.lm.TrainConfig:
            parts.append(f"### `bigbatch.lm.{name}`\n\n```text\n{inspect.getdoc(thing)}\n\n{_fields(thing)}\n```\n")
            continue
        parts.append(_entry(f"### `bigbatch.lm.{name}`", name, thing))
        if thing is bigbatch.lm.Callback:
            parts += [
                _entry(f"#### `{name}.{member}`", member, value)
                for member, value in vars(thing).items()
                if inspect.isfunction(value)
            ]
    return "\n".join(parts)


def _fields(config: type[BaseModel]) -> str:
    """Return the fields of a configuration with type, default and description, as in the section of a docstring."""
    schema = config.model_json_schema()["properties"]
    lines = ["Fields:"]
    for name in dict.fromkeys(name for group in GROUPS for name in group.fields):
        info = config.model_fields[name]
        default = "" if "(default" in (info.description or "") else f" Default: {info.default!r}."
        name = info.alias or name
        text = f"{name} ({_type(schema[name])}): {info.description}.{default}"
        lines.append(
            textwrap.fill(text, WIDTH, initial_indent="    ", subsequent_indent="        ", break_on_hyphens=False)
        )
    return "\n".join(lines)


def _type(schema: Mapping[str, Any]) -> str:
    """Return the type of a field in the words of Python, from its JSON schema."""
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(_type(part) for part in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " | ".join(map(repr, schema.get("enum", [schema.get("const")])))
    if schema["type"] == "array":
        return f"{_type(schema['items'])} | list[{_type(schema['items'])}]"
    kinds = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "null": "None"}
    return kinds[schema["type"]]


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
