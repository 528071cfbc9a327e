"""Generate docs/reference/: api.md from the docstrings of the public names, cli.md from the parser of the command line.

python docs/make_reference.py            # tests/docs/test_reference.py fails if a file is out of date

The site shows cli.md, and the docstrings with mkdocstrings instead of api.md.
"""

import argparse
import dataclasses
import enum
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import bigbatch
import bigbatch.lm
from bigbatch.cli import COMMANDS, arguments
from bigbatch.cli.command_specs import COMMAND_SPECS
from bigbatch.lm.config.field_groups import GROUPS, FieldGroup
from bigbatch.lm.config.train_config import TrainConfig

FOLDER = Path(__file__).parent / "reference"
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
            parts.append(f"### `bigbatch.lm.{name}`\n\n```text\n{inspect.getdoc(thing)}\n\n{_fields()}\n```\n")
            continue
        parts.append(_entry(f"### `bigbatch.lm.{name}`", name, thing))
        if thing is bigbatch.lm.Callback:
            parts += [
                _entry(f"#### `{name}.{member}`", member, value)
                for member, value in vars(thing).items()
                if inspect.isfunction(value)
            ]
    return "\n".join(parts)


def command_line() -> str:
    """Return the page of the command line: every command with its flags, from the parser that reads them."""
    parts = [
        "# Command line\n\nGenerated from the parser by `python docs/make_reference.py`. "
        "`bigbatch COMMAND --help` prints the same.\n",
        _table(("command", "what it does"), [(f"[`{name}`](#bigbatch-{name})", COMMANDS[name]) for name in COMMANDS]),
    ]
    for command, spec in COMMAND_SPECS.items():
        parts.append(f"## bigbatch {command}\n\n{_prose(spec.about)}\n")
        parts.append("\n".join(["```", *spec.examples, "```\n"]))
        parser = arguments._parser(command)
        for (model, group), section in zip(spec.sections, parser._action_groups[-len(spec.sections) :], strict=True):
            if model is TrainConfig and command != "train":
                continue
            rows = [(_usage(action), _prose((action.help or "") % {})) for action in section._group_actions]
            if rows:
                parts.append(f"**{group.title[0].upper() + group.title[1:]}.** {_prose(group.about)}\n")
                parts.append(_table(("flag", "meaning"), rows))
        if command != "train" and (shared := [group for model, group in spec.sections if model is TrainConfig]):
            flags = [
                f"`{arguments._flag(arguments.flag_key(name, TrainConfig.model_fields[name]))}`"
                for group in shared
                for name in group.fields
                if name not in spec.positionals
            ]
            every = len(flags) == sum(len(group.fields) for group in GROUPS)
            parts.append(
                "Settings of [train](#bigbatch-train): " + ("all of them.\n" if every else f"{', '.join(flags)}.\n")
            )
    return "\n".join(parts)


def _usage(action: argparse.Action) -> str:
    return f"`{action.option_strings[0]}{f' {action.metavar}' if action.metavar else ''}`"


def settings_table() -> str:
    """Return the settings of `bigbatch.lm.TrainConfig` as tables, one for each group."""
    parts = []
    for group in GROUPS:
        parts.append(f"**{group.title[0].upper() + group.title[1:]}.** {_prose(group.about)}\n")
        parts.append(
            _table(("setting", "type", "meaning"), [(f"`{a}`", f"`{b}`", _prose(c)) for a, b, c in _settings(group)])
        )
    return "\n".join(parts)


def _table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [titles, ("---",) * len(titles), *([text.replace("|", "\\|") for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _prose(text: str) -> str:
    """Return a text of ``--help`` as Markdown: flags, and words with marks of Markdown, become code."""
    return re.sub(
        r"(?<!\S)([('\"]?)(--[a-z][\w-]*|[^\s'\"(`]*[_*<>\[\]|~][^\s'\"`]*?)(?=[.,:;)'\"]*(?:\s|$))", r"\1`\2`", text
    )


def _settings(group: FieldGroup) -> Iterator[tuple[str, str, str]]:
    """Yield name, type, and description with default of each setting of a group."""
    schema = TrainConfig.model_json_schema()["properties"]
    for field in group.fields:
        info = TrainConfig.model_fields[field]
        default = "" if "(default" in (info.description or "") else f" Default: {info.default!r}."
        name = info.alias or field
        yield name, _type(schema[name]), f"{info.description}.{default}"


def _fields() -> str:
    """Return the settings with type, default and description, as in the section of a docstring."""
    settings = {setting: None for group in GROUPS for setting in _settings(group)}
    return "\n".join(
        ["Fields:"]
        + [
            textwrap.fill(
                f"{name} ({kind}): {text}",
                WIDTH,
                initial_indent="    ",
                subsequent_indent="        ",
                break_on_hyphens=False,
            )
            for name, kind, text in settings
        ]
    )


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
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "api.md").write_text(reference(), encoding="utf-8")
    (FOLDER / "cli.md").write_text(command_line(), encoding="utf-8")
