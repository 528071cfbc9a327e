"""Shapes of records: which fields a record has, and the document that they make.

    text                                   every token is trained on
    prompt, completion                     strings, or messages; the completion is trained on
    messages                               OpenAI's form; the assistant's turns are trained on
    conversations                          ShareGPT's form: from and value
    instruction, input, output             Alpaca's form: a prompt from the first two, and the output
    input_ids or tokens, labels            tokens (see :mod:`bigbatch.lm.data.token_records`)

Other columns are ignored. A field that is null is missing. The shapes of other objectives than next-token prediction
are those of :mod:`bigbatch.lm.data.pairs`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bigbatch.errors import InputError
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.messages import NO_TOKEN, check_trainable, kind_of, listing, to_messages, to_string, to_tools
from bigbatch.lm.data.pairs import EQUAL, Objective, fields_of, has_shape, is_field, to_parts
from bigbatch.lm.data.pairs import EXPECTED as EXPECTED_PARTS
from bigbatch.lm.data.prompt_completion import to_completion, with_system
from bigbatch.lm.data.token_records import LABELS, MASKS, TOKENS, has_token_list, to_token_document
from bigbatch.lm.text import plural

SHAPES = {
    "text": ("text",),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),
    "tokens": ("input_ids",),
}
"""The fields that make each shape."""

FIELDS = (*dict.fromkeys(name for names in SHAPES.values() for name in names), TOKENS)
_BESIDES = ("input", "system", "history", "tools", "functions", "label", LABELS, *MASKS)  # of some shapes
EXPECTED = (
    "A record must have 'text', or 'prompt' and 'completion', or 'messages', or 'conversations' (ShareGPT), or "
    "'instruction' and 'output' (Alpaca), or 'input_ids' (tokens). For a column of another name, pass --text-column "
    "or --messages-column."
)
PREFERENCES = "Pairs of 'chosen' and 'rejected' are for --objective dpo or reward."

ALPACA_PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
ALPACA_PROMPT_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


@dataclass(frozen=True)
class RecordColumns:
    """The columns that records are read from.

    Attributes:
        text: Column whose text is trained on, whatever other columns a record has; None to recognize the shape.
        messages: Column with the messages, likewise.
        objective: Decides about the shapes of records.
    """

    text: str | None = None
    messages: str | None = None
    objective: Objective = "sft"

    @property
    def are_named(self) -> bool:
        """Whether a column is named."""
        return self.text is not None or self.messages is not None

    @property
    def reads_tokens(self) -> bool:
        """Whether records may be tokens."""
        return self.objective == "sft" and not self.are_named

    @property
    def fields(self) -> frozenset[str]:
        """The fields of which a record has some."""
        named = {name for name in (self.text, self.messages) if name is not None}
        return frozenset(named | set(FIELDS if self.objective == "sft" else fields_of(self.objective)))

    @property
    def expected(self) -> str:
        """What a record must have, as a sentence."""
        return EXPECTED if self.objective == "sft" else EXPECTED_PARTS[self.objective]

    def have_shape(self, names: Iterable[str]) -> bool:
        """Return whether fields include all of those of a shape."""
        found = set(names)
        if self.objective != "sft":
            return has_shape(found, self.objective)
        named = [(name,) for name in (self.text, self.messages) if name is not None]
        return any(found >= set(shape) for shape in named or SHAPES.values())

    def needed(self, names: Iterable[str]) -> list[str]:
        """Return those names of a table's columns that a record may be read from."""
        names = list(names)
        if self.objective != "sft":
            return [name for name in names if is_field(name, self.objective)]
        if self.text is not None:
            return [name for name in names if name == self.text]
        wanted = (self.messages, *_BESIDES) if self.messages is not None else (*FIELDS, *_BESIDES)
        return [name for name in names if name in wanted]

    def check(self, names: Iterable[str], source: str) -> None:
        """Check that a table with these columns can have a record.

        Raises:
            InputError: It cannot.
        """
        names = list(names)
        if self.objective != "sft":
            if not self.have_shape(names):
                raise InputError(f"{source} has the columns {listing(names)}. {self.expected}")
            return
        for flag, column in (("--text-column", self.text), ("--messages-column", self.messages)):
            if column is not None and column not in names:
                raise InputError(f"{source} has the columns {listing(names)}, and {flag} {column!r} is not among them.")
        if self.text is None and self.messages is None and not set(names) & set(FIELDS):
            expected = PREFERENCES if {"chosen", "rejected"} <= set(names) else EXPECTED
            raise InputError(f"{source} has the columns {listing(names)}, none of which can be trained on. {expected}")


ANY_COLUMNS = RecordColumns()


def without_nulls(value: Any) -> Any:
    """Return a value of a table without the null entries of its objects: a table has every entry in every object."""
    if isinstance(value, Mapping):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def to_document(record: object, source: str, columns: RecordColumns = ANY_COLUMNS) -> Document:
    """Convert one record to a document.

    Args:
        record: A mapping of one of the shapes of this module.
        source: Names the record in messages, as ``path:line``.
        columns: The columns to read, if not those of a known shape.

    Raises:
        InputError: The record has another structure, or no content to train on.
    """
    if type(record) is not dict and not isinstance(record, Mapping):
        raise InputError(f"{source}: the record is {kind_of(record)} and not an object. {columns.expected}")
    if columns.objective != "sft":
        return to_parts(record, source, columns.objective)
    if columns.text is not None:
        return _text(record, columns.text, source)
    if columns.messages is not None:
        return _conversation(record, columns.messages, source, shape="messages")
    present = tuple([name for name, value in record.items() if value is not None])
    if TOKENS in record and has_token_list(record):
        present = (*present, "input_ids")
    shapes = _shapes_of(present)
    if not shapes:
        missing = [name for name in record if name not in present]
        _check_nulls(tuple(record), missing, source)
        nulls = f" (null: {listing(missing)})" if missing else ""
        expected = PREFERENCES if {"chosen", "rejected"} <= set(present) else EXPECTED
        raise InputError(f"{source}: the record has {listing(name for name in record)}{nulls}. {expected}")
    if shapes == ("text", "Alpaca") and _is_rendered(record):
        shapes = ("Alpaca",)
    if len(shapes) > 1:
        both = " and ".join(repr("+".join(SHAPES[shape])) for shape in shapes)
        flags = [f"--{name}-column {name}" for name in ("text", "messages") if name in shapes]
        choice = f", or pass {' or '.join(flags)}" if flags else ""
        raise InputError(f"{source}: the record has {both}, but only one of them is allowed. Keep one{choice}.")
    match shapes[0]:
        case "text":
            return _text(record, "text", source)
        case "prompt-completion":
            return to_completion(record, source)
        case "Alpaca":
            return _alpaca(record, source)
        case "tokens":
            return to_token_document(record, source)
        case shape:
            return _conversation(record, SHAPES[shape][0], source, shape=shape)


def _check_nulls(names: tuple[str, ...], nulls: Sequence[str], source: str) -> None:
    """Refuse a record that has the fields of a shape, of which some are null.

    Raises:
        InputError: It has; the message names them.
    """
    needed = {name for shape in _shapes_of(names) for name in SHAPES[shape]}
    if found := [name for name in nulls if name in needed]:
        verb = "is" if len(found) == 1 else "are"
        raise InputError(f"{source}: the record cannot be trained on: its {listing(found)} {verb} null.")


@lru_cache(maxsize=1000)
def _shapes_of(names: tuple[object, ...]) -> tuple[str, ...]:
    return tuple(shape for shape, needed in SHAPES.items() if set(names).issuperset(needed))


def shape_notes(shapes: Iterable[str]) -> list[str]:
    """Return what a user must know about the shapes of the records that were read.

    That is which ones there are if there are several, the wording of Alpaca prompts, and how many pairs have no
    difference to learn from.
    """
    numbers = Counter(shapes)
    notes = []
    if len(kinds := [f"{number:,} {shape}" for shape, number in numbers.most_common() if shape != EQUAL]) > 1:
        notes.append(f"records of several shapes: {', '.join(kinds)}")
    if number := numbers["Alpaca"]:
        wording = ALPACA_PROMPT_WITH_INPUT.replace("\n", "\\n")
        notes.append(
            f'{plural(number, "Alpaca record")}: the prompt is "{wording}", without its middle part if there is no '
            "input"
        )
    if number := numbers[EQUAL]:
        notes.append(
            f"{plural(number, 'pair')} whose chosen and rejected are equal: counted in the loss, without a gradient"
        )
    return notes


def _text(record: Mapping[str, Any], column: str, source: str) -> Document:
    text = record.get(column)
    if type(text) is not str or not text.isascii():  # ASCII needs no check, and no message prepared for one
        text = to_string(_value(record, column, "--text-column", source), f"the field {column!r}", source)
    if not text.strip():
        raise InputError(f"{source}: the record {NO_TOKEN}: its text is empty.")
    return Document.of_text(source, text, shape="text")


def _value(record: Mapping[str, Any], column: str, flag: str, source: str) -> Any:
    if record.get(column) is None:
        wrong = f"cannot be trained on: its {column!r} is null" if column in record else f"has {listing(record)}"
        raise InputError(f"{source}: the record {wrong}, and {flag} is {column!r}.")
    return record[column]


def _conversation(record: Mapping[str, Any], column: str, source: str, *, shape: str) -> Document:
    messages = to_messages(_value(record, column, "--messages-column", source), column, source)
    messages = with_system(messages, record, column, source)
    check_trainable(messages, source)
    return Document(source, messages=messages, tools=to_tools(record, source), shape=shape)


def _is_rendered(record: Mapping[str, Any]) -> bool:
    """Return whether the text of an Alpaca record is its instruction and then its output, as many files have it."""
    text, *parts = (record[name] for name in ("text", "instruction", "output"))
    if not all(isinstance(part, str) for part in (text, *parts)):
        return False
    asked, answered = (part.strip() for part in parts)
    _, found, after = text.partition(asked or "\0")
    return bool(found) and after.rstrip().endswith(answered)


def _alpaca(record: Mapping[str, Any], source: str) -> Document:
    given = {name: value for name in _ALPACA if (value := record.get(name)) is not None}
    fields = dict.fromkeys(_ALPACA, "") | {
        n: to_string(value, f"the field {n!r}", source) for n, value in given.items()
    }
    if not fields["output"]:
        raise InputError(f"{source}: the record {NO_TOKEN}: its output is empty.")
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise InputError(f"{source}: the field 'history' must be a list of pairs of an instruction and its output.")
    earlier = (
        ALPACA_PROMPT.format(instruction=to_string(asked, "an instruction of 'history'", source))
        + to_string(answered, "an output of 'history'", source)
        + "\n\n"
        for asked, answered in history
    )
    wording = ALPACA_PROMPT_WITH_INPUT if fields["input"].strip() else ALPACA_PROMPT
    system = f"{fields['system']}\n\n" if fields["system"] else ""
    prompt = "".join((system, *earlier, wording.format(instruction=fields["instruction"], input=fields["input"])))
    return Document(source, prompt=prompt, completion=fields["output"], shape="Alpaca")


_ALPACA = ("instruction", "input", "output", "system")
