"""Read the messages of a conversation from their usual forms, and the tools that they call.

{"role": "user", "content": "Hi"}                                    OpenAI, transformers
{"role": "user", "content": [{"type": "text", "text": "Hi"}]}        parts of text, joined
{"role": "assistant", "tool_calls": [{"function": {...}}]}           arguments as JSON text or as an object
{"from": "human", "value": "Hi"}                                     ShareGPT

→ {"role": one of ROLES, "content": str, ...}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bigbatch.errors import InputError
from bigbatch.lm.data.json_text import parsed, parsed_list

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""The names in ``from`` of a ShareGPT message that are not roles themselves; ``function_call`` is a call of a tool."""

NO_TOKEN = "yields no training token"
MOST_LISTED, LONGEST_NAME = 20, 60  # of names in an error
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-6, 1e6  # of a message, besides 0: float32 holds their sums


def to_messages(value: object, field: str, source: str) -> tuple[dict[str, Any], ...]:
    """Convert a list of messages, or the JSON text of one, to messages with the string ``content``.

    Entries that are null are left out. ``weight`` is kept if it is not 1. Other entries, such as ``name``, are kept for
    the chat template if they are JSON values.

    Args:
        value: The list.
        field: Name of its field, for errors.
        source: Names the record in errors, as ``path:line``.

    Raises:
        InputError: It is no list, is empty, or a message has another form.
    """
    messages = parsed_list(value)
    if not isinstance(messages, list):
        raise InputError(f"{source}: the field {field!r} is {kind_of(value)} and must be a list.")
    if not messages:
        raise InputError(f"{source}: the record {NO_TOKEN}: its list of messages is empty.")
    return tuple(_message(message, f"message {number}", source) for number, message in enumerate(messages, 1))


def check_trainable(messages: tuple[dict[str, Any], ...], source: str) -> None:
    """Check that a conversation has an answer of the assistant to something, and that one has a weight above 0.

    Raises:
        InputError: It has none, or begins with the assistant.
    """
    if messages[0]["role"] == "assistant":
        raise InputError(
            f"{source}: message 1 is from the assistant and answers nothing. Start with a system or user message."
        )
    answers = [turn for turn in messages if turn["role"] == "assistant" and (turn["content"] or "tool_calls" in turn)]
    if not answers:
        raise InputError(f"{source}: the record {NO_TOKEN}: no message of the assistant has content.")
    if not any(turn.get("weight", 1) for turn in answers):
        raise InputError(f"{source}: the record {NO_TOKEN}: every message of the assistant has the weight 0.")


def to_tools(record: Mapping[str, Any], source: str) -> tuple[dict[str, Any], ...] | None:
    """Return the tools of a record: ``tools``, or the older ``functions``, as a list or its JSON text; None for none.

    Raises:
        InputError: They have another form.
    """
    for field in ("tools", "functions"):
        value = record.get(field)
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        tools = parsed_list(value)
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise InputError(
                f"{source}: the field {field!r} is {kind_of(value)} and must be a list of objects, or its JSON text."
            )
        for text in _strings(tools):
            to_string(text, f"the field {field!r}", source)
        if not _is_json(tools):
            raise InputError(f"{source}: the field {field!r} has a value that is not JSON.")
        if tools:
            wrapped = field == "functions"
            return tuple({"type": "function", "function": dict(tool)} if wrapped else dict(tool) for tool in tools)
    return None


def _message(message: object, where: str, source: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"{source}: {where} is {kind_of(message)} and must be an object with 'role' and 'content'.")
    entries = {name: value for name, value in message.items() if value is not None}
    if "role" not in entries and {"from", "value"} <= set(entries):
        return _sharegpt_message(entries, where, source)
    if "role" not in entries or not {"content", "tool_calls", "function_call"} & set(entries):
        raise InputError(
            f"{source}: {where} has {listing(entries)} and must have 'role' and 'content', or 'from' and 'value'."
        )
    role = to_string(entries.pop("role"), f"the role of {where}", source)
    role = "tool" if role == "function" else role
    if role not in ROLES:
        raise InputError(f"{source}: {where} has the role {role!r}; the roles are {', '.join(ROLES)}.")
    content = _content(entries.pop("content", ""), f"the content of {where}", source)
    return {"role": role, "content": content} | _entries(entries, role, where, source)


def _sharegpt_message(entries: dict[str, Any], where: str, source: str) -> dict[str, Any]:
    name = to_string(entries.pop("from"), f"the sender of {where}", source)
    role = SHAREGPT_ROLES.get(name.lower(), name.lower())
    if role not in ROLES:
        known = ", ".join((*ROLES, *SHAREGPT_ROLES))
        raise InputError(f"{source}: {where} is from {name!r}; the senders are {known}.")
    value = entries.pop("value")
    if name.lower() == "function_call":
        call = parsed(value)
        if not isinstance(call, Mapping | list):
            raise InputError(
                f"{source}: {where} calls a tool, and its value is {kind_of(value)} and must be JSON text."
            )
        value, entries = "", entries | {"tool_calls": call if isinstance(call, list) else [call]}
    content = _content(value, f"the value of {where}", source)
    return {"role": role, "content": content} | _entries(entries, role, where, source)


def _content(value: object, what: str, source: str) -> str:
    if not isinstance(value, list):
        return to_string(value, what, source)
    texts = []
    for part in value:
        if not isinstance(part, Mapping):
            raise InputError(f"{source}: {what} has a part that is {kind_of(part)} and must be an object with 'text'.")
        kind = part.get("type", "text")
        if kind not in ("text", "input_text", "output_text") or part.get("text") is None:
            raise InputError(
                f"{source}: {what} has a part of type {kind!r} with {listing(part)}; only parts of text can be trained "
                "on."
            )
        texts.append(to_string(part["text"], f"a part of {what}", source))
    return "".join(texts)


def _entries(entries: dict[str, Any], role: str, where: str, source: str) -> dict[str, Any]:
    """Return the entries of a message besides its role and content."""
    kept: dict[str, Any] = {}
    calls = entries.pop("tool_calls", None)
    if (call := entries.pop("function_call", None)) is not None:
        calls = [*(calls or []), call]
    if calls and role != "assistant":
        raise InputError(f"{source}: {where} calls a tool, and its role is {role}; only the assistant calls tools.")
    if calls:
        kept["tool_calls"] = _tool_calls(calls, where, source)
    weight = _weight(entries.pop("weight", 1), where, source)
    if weight != 1:
        kept["weight"] = weight
    for name, value in entries.items():
        if not isinstance(name, str) or not _is_json(value):
            continue  # a date or bytes of a table, which no template renders
        for text in _strings(value):
            to_string(text, f"the entry {name!r} of {where}", source)
        kept[name] = value
    return kept


def _weight(weight: Any, where: str, source: str) -> int | float:
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or (weight != 0 and not SMALLEST_WEIGHT <= weight <= LARGEST_WEIGHT):
        shown = repr(weight) if len(repr(weight)) <= LONGEST_NAME else kind_of(weight)
        raise InputError(
            f"{source}: the weight of {where} is {shown} and must be 0, or a number from 0.000001 to 1,000,000."
        )
    return int(weight) if weight == int(weight) else weight


def _tool_calls(calls: object, where: str, source: str) -> list[dict[str, Any]]:
    calls = parsed_list(calls)
    if not isinstance(calls, list):
        raise InputError(f"{source}: 'tool_calls' of {where} is {kind_of(calls)} and must be a list.")
    return [_tool_call(call, f"call {number} of {where}", source) for number, call in enumerate(calls, 1)]


def _tool_call(call: object, what: str, source: str) -> dict[str, Any]:
    """Return ``{"type": "function", "function": {"name": str, "arguments": object}}`` with other entries kept."""
    if not isinstance(call, Mapping):
        raise InputError(f"{source}: {what} is {kind_of(call)} and must be an object with 'function'.")
    entries = {name: value for name, value in call.items() if value is not None}
    function = entries.pop("function", None)
    if function is None:  # {"name": ..., "arguments": ...}, as in the older function_call
        function = {name: entries.pop(name) for name in ("name", "arguments", "parameters") if name in entries}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{source}: {what} has no 'function' with a 'name'.")
    given: Any = next((function[name] for name in ("arguments", "parameters") if function.get(name) is not None), {})
    arguments = parsed(given) if isinstance(given, str) and given.strip() else given or {}
    if not isinstance(arguments, Mapping) or not _is_json(arguments):
        raise InputError(
            f"{source}: the arguments of {what} are {kind_of(given)} and must be an object, or the JSON text of one."
        )
    for text in _strings([function["name"], arguments]):
        to_string(text, what, source)
    return {"type": "function", **entries, "function": {"name": function["name"], "arguments": dict(arguments)}}


def to_string(value: object, what: str, source: str) -> str:
    """Return a value that must be a string of whole characters.

    Raises:
        InputError: It is not; ``what`` names it in the message.
    """
    if not isinstance(value, str):
        raise InputError(f"{source}: {what} is {kind_of(value)} and must be a string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can encode half of a surrogate pair, which is not a character and which no tokenizer accepts.
        raise InputError(
            f"{source}: {what} has half of a surrogate pair, {value[error.start]!a}, which is not a character."
        ) from None
    return value


def kind_of(value: object) -> str:
    """Return the JSON name of a value's type, with its article."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "an object"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), f"a {type(value).__name__}")


def listing(names: Iterable[Any]) -> str:
    """Return names in quotes, for errors; of many, the first ones."""
    listed = [repr(name) if len(repr(name)) <= LONGEST_NAME else f"{repr(name)[:LONGEST_NAME]}…" for name in names]
    more = [f"and {len(listed) - MOST_LISTED:,} more"] if len(listed) > MOST_LISTED else []
    return ", ".join([*listed[:MOST_LISTED], *more]) or "no field"


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _strings(value: object) -> Iterator[str]:
    """Yield every string in a JSON value, keys included."""
    remaining = [value]  # no recursion: JSON may be nested as deep as Python can read it
    while remaining:
        part = remaining.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, Mapping):
            remaining += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            remaining += part
