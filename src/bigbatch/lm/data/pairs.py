"""Shapes of records whose sequences are compared: pairs of answers, and queries with their passages.

    chosen, rejected, prompt               dpo and reward: strings, or messages; the prompt is optional
    query or anchor, positive, negative    embedding: strings; no negative, one, or a list of them

Without ``prompt``, the prompt of a pair is what chosen and rejected begin with in common, as in TRL. Other columns are
ignored. A field that is null is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any, Literal, TypeAlias

from bigbatch.errors import InputError
from bigbatch.lm.data.documents import Document, Part
from bigbatch.lm.data.messages import kind_of, listing, to_messages, to_string, to_tools

Objective: TypeAlias = Literal["sft", "dpo", "reward", "embedding"]
Content: TypeAlias = "str | tuple[dict[str, Any], ...]"

PREFERENCE_FIELDS = ("chosen", "rejected")
QUERY_FIELDS = ("query", "anchor")  # two names of one field
EQUAL = "preference without a difference"
"""Shape of a pair whose chosen and rejected are equal."""

EXPECTED: dict[str, str] = {
    "dpo": "With --objective dpo a record must have 'chosen' and 'rejected', and may have 'prompt'.",
    "reward": "With --objective reward a record must have 'chosen' and 'rejected', and may have 'prompt'.",
    "embedding": (
        "With --objective embedding a record must have 'query' (or 'anchor') and 'positive', and may have 'negative'."
    ),
}


def fields_of(objective: Objective) -> tuple[str, ...]:
    """Return the names of the fields that records of an objective are read from."""
    if objective == "embedding":
        return (*QUERY_FIELDS, "positive", "negative")
    return (*PREFERENCE_FIELDS, "prompt", "tools", "functions", "margin")


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
    given = {name: record[name] for name in ("prompt", *PREFERENCE_FIELDS) if record.get(name) is not None}
    is_conversation = any(not isinstance(value, str) for value in given.values())
    contents = {name: _content(value, name, source, is_conversation) for name, value in given.items()}
    chosen, rejected = (contents[name] for name in PREFERENCE_FIELDS)
    context = contents.get("prompt")
    if context is None:
        size = shared_prefix(chosen, rejected)
        context, chosen, rejected = chosen[:size], chosen[size:], rejected[size:]
    if is_conversation and objective == "dpo" and not context:
        raise InputError(
            f"{source}: 'chosen' and 'rejected' begin with no message in common, which could be the prompt. Add it as "
            "'prompt'."
        )
    if is_conversation and not (chosen and rejected):
        raise InputError(f"{source}: 'chosen' and 'rejected' have no answer after the messages that both begin with.")
    if not any((context, chosen, rejected)):
        raise InputError(f"{source}: 'chosen' and 'rejected' are empty.")
    tools = to_tools(record, source) if is_conversation else None
    parts = Part("chosen", context, chosen, tools), Part("rejected", context, rejected, tools)
    return Document(source, parts=parts, shape=EQUAL if chosen == rejected else "preference")


def _content(value: Any, name: str, source: str, is_conversation: bool) -> Content:
    """Return a string, or messages without weights: a string among messages is that of the user or the assistant."""
    if not is_conversation:
        return to_string(value, f"the field {name!r}", source)
    if isinstance(value, str):
        value = [{"role": "user" if name == "prompt" else "assistant", "content": value}]
    return tuple(
        {key: entry for key, entry in message.items() if key != "weight"}
        for message in to_messages(value, name, source)
    )


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
    negatives = record.get("negative")
    if negatives is None:
        negatives = []
    elif isinstance(negatives, str):
        negatives = [negatives]
    elif not isinstance(negatives, list):
        raise InputError(f"{source}: the field 'negative' is {kind_of(negatives)} and must be a string or a list.")
    given = [(names[0], record[names[0]]), ("positive", record["positive"])]
    given += [("negative", negative) for negative in negatives]
    parts = []
    for name, value in given:
        text = to_string(value, f"the field {name!r}", source)
        if not text.strip():
            raise InputError(f"{source}: the field {name!r} is empty.")
        parts.append(Part("query" if name in QUERY_FIELDS else name, "", text))
    return Document(source, parts=tuple(parts), shape="query")
