"""Shapes of records whose sequences are compared: pairs of answers, and queries with their passages.

    chosen, rejected, prompt, system       dpo and reward: strings, or messages; the prompt is optional, and so is the
                                           system message, before messages only
    query or anchor, positive, negative    embedding: strings; no negative, one, or a list of them
    negative_1, negative_2, ...            in place of negative

Without ``prompt``, the prompt of a pair is what chosen and rejected begin with in common, as in TRL; likewise of
conversations that both begin with the messages of ``prompt``. Messages and lists of strings may be JSON text. Other
columns are ignored. A field that is null is missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import takewhile
from typing import Any, Literal, TypeAlias

from bigbatch.errors import InputError
from bigbatch.lm.data.documents import Document, Part
from bigbatch.lm.data.json_text import parsed_messages, parsed_strings
from bigbatch.lm.data.messages import kind_of, listing, to_messages, to_string, to_tools
from bigbatch.lm.data.prompt_completion import (
    SYSTEM_ROLES,
    Messages,
    check_all_used,
    check_no_history,
    prompt_messages,
    split_conversation,
    with_system,
)

Objective: TypeAlias = Literal["sft", "dpo", "reward", "embedding"]
Content: TypeAlias = "str | Messages"

PREFERENCE_FIELDS = ("chosen", "rejected")
QUERY_FIELDS = ("query", "anchor")  # two names of one field
EQUAL = "preference without a difference"
"""Shape of a pair whose chosen and rejected are equal."""

_NO_ANSWER = "'chosen' and 'rejected' have no answer after the messages that both begin with."

EXPECTED: dict[str, str] = {
    "dpo": "With --objective dpo a record must have 'chosen' and 'rejected', and may have 'prompt'.",
    "reward": "With --objective reward a record must have 'chosen' and 'rejected', and may have 'prompt'.",
    "embedding": (
        "With --objective embedding a record must have 'query' (or 'anchor') and 'positive', and may have 'negative' "
        "(or 'negative_1', 'negative_2' and so on)."
    ),
}


_NUMBERED_NEGATIVE = re.compile(r"negative_(\d+)", re.ASCII)  # of the n-tuples of sentence-transformers


def fields_of(objective: Objective) -> tuple[str, ...]:
    """Return the names of the fields that records of an objective are read from, without numbered ones."""
    if objective == "embedding":
        return (*QUERY_FIELDS, "positive", "negative")
    return (*PREFERENCE_FIELDS, "prompt", "system", "history", "tools", "functions", "margin")


def is_field(name: str, objective: Objective) -> bool:
    """Return whether records of an objective are read from the field of this name."""
    return name in fields_of(objective) or (objective == "embedding" and _NUMBERED_NEGATIVE.fullmatch(name) is not None)


def has_shape(names: set[str], objective: Objective) -> bool:
    """Return whether a record, or a table, with these fields can be a record of an objective."""
    if objective == "embedding":
        return "positive" in names and bool(names & set(QUERY_FIELDS))
    return names >= set(PREFERENCE_FIELDS)


def to_parts(record: Mapping[str, Any], source: str, objective: Objective) -> Document:
    """Convert one record to a document with parts.

    Args:
        record: Of one of the shapes of this module.
        source: Names the record in messages, as ``path:line``.
        objective: Decides about the shape.

    Raises:
        InputError: The record has another structure, or no content.
    """
    present = {name for name, value in record.items() if value is not None}
    if not has_shape(present, objective):
        nulls = f" (null: {listing(name for name in record if name not in present)})" if present != set(record) else ""
        raise InputError(f"{source}: the record has {listing(name for name in record)}{nulls}. {EXPECTED[objective]}")
    return _query(record, source) if objective == "embedding" else _preference(record, source, objective)


def _preference(record: Mapping[str, Any], source: str, objective: Objective) -> Document:
    if objective == "reward" and record.get("margin") is not None:
        raise InputError(
            f"{source}: the record has 'margin', which --objective reward does not use. Remove the column if the "
            "margins may be ignored."
        )
    names = [name for name in ("prompt", *PREFERENCE_FIELDS) if record.get(name) is not None]
    given = {name: parsed_messages(record[name], name, source) for name in names}
    context: Content
    chosen: Content
    rejected: Content
    if is_conversation := any(not isinstance(value, str) for value in given.values()):
        context, chosen, rejected = _conversations(given, source, objective)
        context = _with_system(context, chosen, rejected, record, source)
    else:
        strings = "a prompt that is a string" if "prompt" in given else "answers that are strings"
        check_all_used(record, strings, PREFERENCE_FIELDS, source)
        context, chosen, rejected = _strings(given, source)
    if not any((context, chosen, rejected)):
        raise InputError(f"{source}: 'chosen' and 'rejected' are empty.")
    tools = to_tools(record, source) if is_conversation else None
    parts = Part("chosen", context, chosen, tools), Part("rejected", context, rejected, tools)
    return Document(source, parts=parts, shape=EQUAL if chosen == rejected else "preference")


def _strings(given: Mapping[str, object], source: str) -> tuple[Content, Content, Content]:
    """Return the prompt, chosen and rejected of a pair of strings."""
    texts = {name: to_string(value, f"the field {name!r}", source) for name, value in given.items()}
    chosen, rejected = (texts[name] for name in PREFERENCE_FIELDS)
    if "prompt" in texts:
        return texts["prompt"], chosen, rejected
    size = shared_prefix(chosen, rejected)
    return chosen[:size], chosen[size:], rejected[size:]


def _conversations(
    given: Mapping[str, object], source: str, objective: Objective
) -> tuple[Messages, Messages, Messages]:
    """Return the prompt, chosen and rejected of a pair of messages: a string is that of the user or the assistant."""
    context = _without_weights(prompt_messages(given["prompt"], source)) if "prompt" in given else ()
    chosen, rejected = (_answer(given[name], name, source) for name in PREFERENCE_FIELDS)
    wholes = _whole_conversations(context, chosen, rejected, source) if context else (chosen, rejected)
    if wholes is not None:
        chosen, rejected = wholes
        size = shared_prefix(chosen, rejected)
        context, chosen, rejected = chosen[:size], chosen[size:], rejected[size:]
    if objective == "dpo" and not context:
        raise InputError(
            f"{source}: 'chosen' and 'rejected' begin with no message in common, which could be the prompt. Add it as "
            "'prompt'."
        )
    if not (chosen and rejected):
        raise InputError(f"{source}: {_NO_ANSWER}")
    return context, chosen, rejected


def _with_system(
    context: Messages, chosen: Messages, rejected: Messages, record: Mapping[str, Any], source: str
) -> Messages:
    """Return the prompt after the message of the column ``system``, if the record has one.

    Raises:
        InputError: The prompt or an answer begins with one, too; or there are earlier turns in a column.
    """
    check_no_history(record, source)
    if context:
        return with_system(context, record, "prompt" if record.get("prompt") else "chosen", source)
    for name, answer in zip(PREFERENCE_FIELDS, (chosen, rejected), strict=True):
        with_system(answer, record, name, source)  # for its error
    return with_system((), record, "prompt", source)


def _answer(value: object, name: str, source: str) -> Messages:
    value = [{"role": "assistant", "content": value}] if isinstance(value, str) else value
    return _without_weights(to_messages(value, name, source))


def _without_weights(messages: Messages) -> Messages:
    return tuple({name: entry for name, entry in message.items() if name != "weight"} for message in messages)


def _whole_conversations(
    prompt: Messages, chosen: Messages, rejected: Messages, source: str
) -> tuple[Messages, Messages] | None:
    """Return chosen and rejected as whole conversations if both begin with the prompt; None if they are answers.

    Raises:
        InputError: One of both begins with the prompt, or has no answer after it, or begins with another question.
    """
    found = {}
    for name, messages in zip(PREFERENCE_FIELDS, (chosen, rejected), strict=True):
        found[name] = split_conversation(prompt, messages)
        role = messages[0]["role"]
        if found[name] is None and prompt[-1]["role"] == "user" and role in ("user", *SYSTEM_ROLES):
            raise InputError(
                f"{source}: 'prompt' ends with a message of the user, and {name!r} begins with one of the {role}. "
                "Remove 'prompt' if 'chosen' and 'rejected' are whole conversations."
            )
    wholes = [whole for whole in found.values() if whole is not None]
    if not wholes or (len(wholes) == 1 and prompt[-1]["role"] != "user"):
        return None  # answers may begin with a message of the user then, such as the same question again
    if len(wholes) == 1:
        one, other = sorted(PREFERENCE_FIELDS, key=lambda name: found[name] is None)
        raise InputError(
            f"{source}: {one!r} begins with the messages of 'prompt', and {other!r} does not. Remove them from {one!r}."
        )
    if not all(answer for _, answer in wholes):
        raise InputError(f"{source}: {_NO_ANSWER}")
    first, second = ((*context, *answer) for context, answer in wholes)
    return first, second


def shared_prefix(chosen: Content, rejected: Content) -> int:
    """Return how many characters or messages are the prompt of two sequences, as TRL's ``extract_prompt`` does.

    The part that both begin with, without the last character or message of the shorter one; of strings, also without
    one space at its end, which belongs to the answer. (TRL also moves the last character of a sequence into the prompt
    if the first ones differ and that is a space; the prompt is empty here.)
    """
    most = max(0, min(len(chosen), len(rejected)) - 1)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:most], rejected[:most], strict=True))
    size = sum(1 for _ in same)
    differs_here = bool(chosen[size : size + 1] != rejected[size : size + 1])
    return size - 1 if size and differs_here and chosen[size - 1] == " " else size


def _query(record: Mapping[str, Any], source: str) -> Document:
    names = [name for name in QUERY_FIELDS if record.get(name) is not None]
    if len(names) > 1:
        raise InputError(f"{source}: the record has 'query' and 'anchor', which are two names of one field. Keep one.")
    given = [(name, record[name]) for name in (names[0], "positive")] + _negatives(record, source)
    parts = []
    for name, value in given:
        text = to_string(value, f"the field {name!r}", source)
        if not text.strip():
            raise InputError(f"{source}: the field {name!r} is empty.")
        part = "query" if name in QUERY_FIELDS else "positive" if name == "positive" else "negative"
        parts.append(Part(part, "", text))
    return Document(source, parts=tuple(parts), shape="query")


def _negatives(record: Mapping[str, Any], source: str) -> list[tuple[str, Any]]:
    """Return the negatives of a query, each with its field: ``negative``, or ``negative_1`` and so on, in order."""
    matches = [match for name in record if (match := _NUMBERED_NEGATIVE.fullmatch(name)) is not None]
    numbered = [match[0] for match in sorted(matches, key=lambda match: int(match[1]))]
    numbered = [name for name in numbered if record[name] is not None and str(record[name]).strip()]  # as cells of CSV
    negatives = parsed_strings(record.get("negative"), "negative", source)
    if negatives is None:
        return [(name, record[name]) for name in numbered]
    if numbered:
        raise InputError(f"{source}: the record has 'negative' and {listing(numbered)}. Keep one form of negatives.")
    if not isinstance(negatives, str | list):
        raise InputError(f"{source}: the field 'negative' is {kind_of(negatives)} and must be a string or a list.")
    return [("negative", negative) for negative in ([negatives] if isinstance(negatives, str) else negatives)]
