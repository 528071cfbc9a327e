"""One sentence about what is wrong: pydantic's complaints in the user's words, and near matches of misspelt names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from pydantic import ValidationError

from bigbatch.cli.options import FOREIGN_NAMES


def sentence(error: ValidationError, spelled: Mapping[str, str]) -> str:
    """Return the first thing that ``error`` complains about as one sentence, in the user's names of the fields."""
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    if not first["loc"]:  # about several fields, which the message names
        names = "|".join(re.escape(str(value)) for value in context.values())
        return re.sub(rf"\b({names})\b", lambda found: spelled.get(found[0], found[0]), first["msg"]) + "."
    key, *inside = map(str, first["loc"])
    verb = "holds" if inside else "is"
    return f"{spelled.get(key, key)} {verb} {shown(first['input'])}: {_demand(first['type'], first['msg'], context)}."


_DEMANDS = {
    "int": "it must be a whole number",
    "int_parsing_size": "it is too large",
    "float": "it must be a number",
    "finite_number": "it must be a finite number",
    "greater_than_equal": "it must be at least {ge:g}",
    "greater_than": "it must be more than {gt:g}",
    "less_than_equal": "it must be at most {le}",
    "less_than": "it must be less than {lt:g}",
    "string_type": "it must be text",
    "string_too_short": "it must not be empty",
    "string_unicode": "it must be valid UTF-8 text",
    "bool_type": "it must be true or false",
    "tuple_type": "it must be a list of numbers",
}


def _demand(kind: str, message: str, context: Mapping[str, object]) -> str:
    """What a value must be, from pydantic's error type; our own validators' messages say it already."""
    if kind == "literal_error":
        return "it must be " + str(context["expected"]).replace("'", "")
    if kind.startswith(("int_", "float_")) and kind not in _DEMANDS:
        kind = kind.partition("_")[0]
    return _DEMANDS[kind].format(**context) if kind in _DEMANDS else message[0].lower() + message[1:]


def shown(value: object) -> str:
    """A value as the user wrote it: numbers bare, text in quotes, TOML's words for the rest."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, str) and not re.fullmatch(
        r"[+-]?([\d.][\d_.]*(e[+-]?\d+)?|nan|inf(inity)?)", value, re.IGNORECASE
    ):
        return short(repr(value))
    return short(str(value))


def short(text: str) -> str:
    """Cut what the user wrote to what fits a sentence."""
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Find the field that the user probably meant: nearest by spelling, to its name here or elsewhere."""
    names = {key: key for key in known}
    names |= {theirs: ours for theirs, ours in FOREIGN_NAMES.items() if ours in names}
    near = difflib.get_close_matches(word.strip("-").replace("-", "_").lower(), names, n=1)
    return names[near[0]] if near else None


def hint(command: str, near: str | None) -> str:
    """Say what was probably meant, or where to look."""
    return f"did you mean {near}?" if near else f"bigbatch {command} --help lists them."
