"""Records with a prompt and a completion, and how a prompt, a system message and an answer are joined.

    prompt, completion     strings, or messages, which may be JSON text; a string among messages is that of the user,
                           or of the assistant

Messages that begin with those of the prompt are a whole conversation, and the prompt is used once.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any, TypeAlias

from bigbatch.errors import InputError
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.json_text import parsed_list, parsed_messages
from bigbatch.lm.data.messages import NO_TOKEN, check_trainable, listing, to_messages, to_string, to_tools

Messages: TypeAlias = "tuple[dict[str, Any], ...]"

SYSTEM_ROLES = ("system", "developer")
UNPAIRED = "Unpaired preferences are not for bigbatch train: use a trainer of TRL, made exact with bigbatch."


def to_completion(record: Mapping[str, Any], source: str) -> Document:
    """Convert a record with ``prompt`` and ``completion`` to a document.

    Args:
        record: The record.
        source: Names the record in messages, as ``path:line``.

    Raises:
        InputError: The record has another structure, or no content to train on.
    """
    prompt, completion = (parsed_messages(record[name], name, source) for name in ("prompt", "completion"))
    if isinstance(record.get("label"), bool) or str(record.get("label")).strip().lower() in ("true", "false"):
        raise InputError(
            f"{source}: the record has 'label' {record['label']!r}, and without it bad completions would be trained on "
            f"like good ones. {UNPAIRED} Or keep the good completions, and remove the column 'label'."
        )
    if not isinstance(prompt, list) and not isinstance(completion, list):
        prompt = to_string(prompt, "the field 'prompt'", source)
        completion = to_string(completion, "the field 'completion'", source)
        if not completion:
            raise InputError(f"{source}: the record {NO_TOKEN}: its completion is empty.")
        check_all_used(record, "a prompt that is a string", ("prompt", "completion"), source)
        return Document(source, prompt=prompt, completion=completion, shape="prompt-completion")
    check_no_history(record, source)
    context = prompt_messages(prompt, source)
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    answer = to_messages(answer, "completion", source)
    if (whole := split_conversation(context, answer)) is not None:
        context, answer = whole
    # What the assistant says in the prompt is context, as in a prompt that is a string.
    context = tuple(turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in context)
    messages = with_system((*context, *answer), record, "prompt", source)
    check_trainable(messages, source)
    return Document(source, messages=messages, tools=to_tools(record, source), shape="prompt-completion")


def prompt_messages(prompt: object, source: str) -> Messages:
    """Return a prompt among messages as messages: a string is one of the user, and a blank one none.

    Raises:
        InputError: It is neither a string nor messages.
    """
    if not isinstance(prompt, str):
        return to_messages(prompt, "prompt", source)
    return to_messages([{"role": "user", "content": prompt}], "prompt", source) if prompt.strip() else ()


def check_all_used(record: Mapping[str, Any], strings: str, fields: tuple[str, ...], source: str) -> None:
    """Check that a record of strings has no field that only messages can use.

    Args:
        record: The record.
        strings: What of it is a string, for the message.
        fields: The fields that would have to be messages.
        source: Names the record in messages, as ``path:line``.

    Raises:
        InputError: It has one; the message names it.
    """
    unused = ["system"] if record.get("system") else []
    unused += ["history"] if parsed_list(record.get("history")) else []
    unused += [name for name in ("tools", "functions") if record.get(name) and to_tools(record, source)]
    if unused:
        first, *others = map(repr, fields)
        raise InputError(
            f"{source}: the record has {listing(unused)} and {strings}, which cannot use it. "
            f"Add it to 'prompt', make {first} and {' and '.join(others)} messages, or remove it."
        )


def check_no_history(record: Mapping[str, Any], source: str) -> None:
    """Check that a record of messages has no column with earlier turns.

    Raises:
        InputError: It has one.
    """
    if parsed_list(record.get("history")):
        raise InputError(
            f"{source}: the record has 'history', which is not used with messages. Add its turns to 'prompt', or "
            "remove it."
        )


def split_conversation(prompt: Messages, messages: Messages) -> tuple[Messages, Messages] | None:
    """Return the prompt and the rest of messages that begin with the prompt; None if they do not.

    The system messages may be in the prompt, in the messages, or the same in both. Weights, and space around contents,
    are not compared.
    """
    system, asked = _split_system(prompt)
    own_system, turns = _split_system(messages)
    if not (asked or (system and own_system)) or _said(turns[: len(asked)]) != _said(asked):
        return None
    if system and own_system and _said(system) != _said(own_system):
        return None
    return (*(own_system or system), *turns[: len(asked)]), turns[len(asked) :]


def _split_system(messages: Messages) -> tuple[Messages, Messages]:
    """Return the system messages at the start, and the others."""
    system = tuple(takewhile(lambda message: message["role"] in SYSTEM_ROLES, messages))
    return system, messages[len(system) :]


def _said(messages: Messages) -> list[dict[str, Any]]:
    """Return what is compared of messages."""
    return [
        {name: value for name, value in message.items() if name != "weight"} | {"content": message["content"].strip()}
        for message in messages
    ]


def with_system(messages: Messages, record: Mapping[str, Any], column: str, source: str) -> Messages:
    """Return the messages after that of the column ``system``, if the record has one.

    Raises:
        InputError: The messages, which are those of ``column``, begin with one, too.
    """
    if record.get("system") is None or not (system := to_string(record["system"], "the field 'system'", source)):
        return messages
    if messages and messages[0]["role"] in SYSTEM_ROLES:
        raise InputError(f"{source}: the record has 'system', and {column!r} begins with one. Keep one of them.")
    return ({"role": "system", "content": system}, *messages)
