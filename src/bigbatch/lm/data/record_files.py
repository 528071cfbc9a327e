"""Read and validate records from JSON lines, Parquet and datasets.

record (a dict and its file and line) → validated → Document
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bigbatch.errors import InputError, first_line
from bigbatch.lm.data.documents import Document

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".parquet")
FIELDS = ("text", "prompt", "completion", "messages")
ROLES = ("system", "user", "assistant")
EXPECTED = "A record must have 'text', or 'prompt' and 'completion', or 'messages'."
NO_TOKEN = "yields no training token"


def read_records(path: Path, source: str, *, broken: list[str] | None = None) -> Iterator[Document]:
    """Yield a document for each record of a file of ``RECORD_SUFFIXES``; ``source`` names the file in messages.

    Args:
        path: The file.
        source: Name of the file in messages.
        broken: List to which the error of each invalid record is appended, which is then skipped; None to raise it.

    Raises:
        InputError: The file cannot be read, or :func:`to_document` refuses a record.
        OSError: The operating system refuses the file.
    """
    read = _read_parquet if path.suffix.lower() == ".parquet" else _read_json_lines
    return read(path, source, broken)


def rows_to_documents(
    rows: Iterable[Mapping[str, Any]], names: Iterable[str], source: str, *, broken: list[str] | None = None
) -> Iterator[Document]:
    """Yield a document for each row of a table with the columns ``names``.

    A table has every column in every row, so null means a missing field. The source of a document is ``source`` with
    the row number, from 1.

    Raises:
        InputError: The table has none of the known columns, or :func:`to_document` refuses a row.
    """
    names = list(names)
    if not set(names) & set(FIELDS):
        raise InputError(f"{source} has the columns {_listing(names)}, none of which can be trained on. {EXPECTED}")
    for number, row in enumerate(rows, 1):
        record = {name: value for name, value in row.items() if value is not None}
        yield from _valid_document(partial(to_document, record, f"{source}:{number}"), broken)


def _valid_document(read: Callable[[], Document], broken: list[str] | None) -> Iterator[Document]:
    try:
        document = read()
    except InputError as error:
        if broken is None:
            raise
        broken.append(str(error))
    else:
        yield document


def to_document(record: object, source: str) -> Document:
    """Convert one record to a document; fields other than the four known ones are ignored.

    Args:
        record: A mapping with ``text``, with ``prompt`` and ``completion``, or with ``messages``, a list of
            ``{"role": "system" | "user" | "assistant", "content": str}``.
        source: Names the record in messages, as ``path:line``.

    Raises:
        InputError: The record has another structure, or no content to train on.
    """
    if not isinstance(record, Mapping):
        raise InputError(f"{source}: the record is {_kind(record)} and not an object. {EXPECTED}")
    kinds = [kind for kind in (("text",), ("prompt", "completion"), ("messages",)) if all(f in record for f in kind)]
    if not kinds:
        raise InputError(f"{source}: the record has {_listing(record)}. {EXPECTED}")
    if len(kinds) > 1:
        both = " and ".join(repr("+".join(kind)) for kind in kinds)
        raise InputError(f"{source}: the record has {both}, but only one of them is allowed. Keep one.")
    if kinds == [("messages",)]:
        return Document(source, messages=_messages(record["messages"], source))
    content = {field: _string(record[field], f"the field {field!r}", source) for field in kinds[0]}
    if "text" in content:
        if not content["text"].strip():
            raise InputError(f"{source}: the record {NO_TOKEN}: its text is empty.")
        return Document(source, text=content["text"])
    if not content["completion"]:
        raise InputError(f"{source}: the record {NO_TOKEN}: its completion is empty.")
    return Document(source, prompt=content["prompt"], completion=content["completion"])


def _messages(messages: object, source: str) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list):
        raise InputError(f"{source}: the field 'messages' is {_kind(messages)} and must be a list.")
    if not messages:
        raise InputError(f"{source}: the record {NO_TOKEN}: its list of messages is empty.")
    turns = tuple(_message(message, number, source) for number, message in enumerate(messages, 1))
    if turns[0]["role"] == "assistant":
        raise InputError(
            f"{source}: message 1 is from the assistant and answers nothing. Start with a system or user message."
        )
    if not any(turn["role"] == "assistant" and turn["content"] for turn in turns):
        raise InputError(f"{source}: the record {NO_TOKEN}: no message of the assistant has content.")
    return turns


def _message(message: object, number: int, source: str) -> dict[str, str]:
    where = f"message {number}"
    if not isinstance(message, Mapping):
        raise InputError(f"{source}: {where} is {_kind(message)} and must be an object with 'role' and 'content'.")
    fields = {name: value for name, value in message.items() if value is not None}
    if set(fields) != {"role", "content"}:
        raise InputError(f"{source}: {where} has {_listing(fields)} and must have exactly 'role' and 'content'.")
    turn = {name: _string(fields[name], f"the {name} of {where}", source) for name in ("role", "content")}
    if turn["role"] not in ROLES:
        raise InputError(f"{source}: {where} has the role {turn['role']!r}; the roles are {', '.join(ROLES)}.")
    return turn


def _string(value: object, what: str, source: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{source}: {what} is {_kind(value)} and must be a string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can encode half of a surrogate pair, which is not a character and which no tokenizer accepts.
        raise InputError(
            f"{source}: {what} has half of a surrogate pair, {value[error.start]!a}, which is not a character."
        ) from None
    return value


def _kind(value: object) -> str:
    """Return the JSON name of a value's type, with its article."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "an object"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), f"a {type(value).__name__}")


def _listing(names: Iterable[Any]) -> str:
    listed = ", ".join(repr(name) for name in names)
    return listed or "no field"


def _read_json_lines(path: Path, source: str, broken: list[str] | None) -> Iterator[Document]:
    with path.open("rb") as file:
        offset = 0
        # Split at \n only: JSON strings may contain the other separators of str.splitlines.
        for number, raw in enumerate(file, 1):
            if raw.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip():
                yield from _valid_document(partial(_read_line, raw, f"{source}:{number}", offset), broken)
            offset += len(raw)


def _read_line(raw: bytes, place: str, offset: int) -> Document:
    line = decode_utf8(raw, place, offset)
    return to_document(_parse(line.removeprefix("\ufeff") if offset == 0 else line, place), place)


def _parse(line: str, place: str) -> object:
    try:
        return json.loads(
            line.rstrip()
        )  # with a newline, an error at the end would be reported in column 1 of the next line
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not valid JSON: {error.msg} at column {error.colno}.") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested thousands deep
        raise InputError(f"{place}: JSON that Python cannot read: {first_line(error)}.") from None


def _read_parquet(path: Path, source: str, broken: list[str] | None) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names: list[str] = file.schema_arrow.names
            columns = [name for name in names if name in FIELDS]
            rows = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
            yield from rows_to_documents(rows, names, source, broken=broken)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{source} cannot be read as a Parquet file: {first_line(error)}.") from None


def decode_utf8(data: bytes, source: str, offset: int = 0) -> str:
    """Decode UTF-8 bytes that start at byte ``offset`` of the file.

    Raises:
        InputError: Invalid UTF-8; the message has the offset of the first invalid byte, from 0, in the file.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source} is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start:,}. "
            "Convert it to UTF-8, or remove it."
        ) from None
