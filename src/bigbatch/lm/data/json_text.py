"""Lists that a record has as JSON text, as files of text such as CSV must have them.

    '[{"role": "user", "content": "Hi"}]'     messages, in each field that may hold messages
    '["first", "second"]'                     strings, in each field that may hold a list of strings
    '[1] says so', '[{"id": 3}]'              texts

What Python writes for such a list, as pandas does into CSV, is refused: it is not JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from bigbatch.errors import InputError

_PYTHON_MESSAGES = re.compile(r"\s*\[\s*\{\s*'(?:role|content|from|value)'\s*:.*\}\s*\]\s*", re.DOTALL)
_PYTHON_STRINGS = re.compile(
    r"""\s*\[\s*(?:(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")[\s,]*)+\]\s*""", re.DOTALL
)  # commas may be missing: numpy writes none


def parsed(value: object) -> object:
    """Return the value of JSON text; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def parsed_list(value: object) -> object:
    """Return the list of a list's JSON text, as tables of text have it; anything else as it is."""
    found = parsed(value)
    return found if isinstance(found, list) else value


def parsed_messages(value: object, field: str, source: str) -> object:
    """Return the list of messages of its JSON text; anything else, such as another text, as it is.

    Args:
        value: That of a field which may be a string or messages.
        field: Its name, for errors.
        source: Names the record in errors, as ``path:line``.

    Raises:
        InputError: It is the text of such a list in Python's notation.
    """
    found = _list_of(value, _are_messages)
    if found is value and isinstance(value, str) and _PYTHON_MESSAGES.fullmatch(value):
        raise InputError(_not_json(field, source, "messages"))
    return found


def parsed_strings(value: object, field: str, source: str) -> object:
    """Return the list of strings of its JSON text; anything else, such as another text, as it is.

    Args:
        value: That of a field which may be a string or a list of strings.
        field: Its name, for errors.
        source: Names the record in errors, as ``path:line``.

    Raises:
        InputError: It is the text of such a list in Python's notation.
    """
    found = _list_of(value, _are_strings)
    if found is value and isinstance(value, str) and _PYTHON_STRINGS.fullmatch(value):
        raise InputError(_not_json(field, source, "strings"))
    return found


def _list_of(value: object, accepts: Callable[[object], bool]) -> object:
    """Return the value of JSON text that begins as a list, if it is accepted; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    found = parsed(value)
    return found if accepts(found) else value


def _are_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(entry: object) -> bool:
    """Return whether an entry of a list has the fields of a message."""
    if not isinstance(entry, Mapping):
        return False
    return {"from", "value"} <= entry.keys() or (
        "role" in entry and bool({"content", "tool_calls", "function_call"} & entry.keys())
    )


def _are_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _not_json(field: str, source: str, what: str) -> str:
    return (
        f"{source}: the field {field!r} is a list of {what} in Python's notation, and must be JSON text. Write it with "
        "json.dumps."
    )
