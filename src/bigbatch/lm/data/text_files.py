"""Read files of text: one document each, or, of a large file, several documents that end at line ends."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO

from bigbatch.errors import InputError
from bigbatch.lm.data.compression import not_utf8
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.reading import Reading, UnknownShapeError
from bigbatch.lm.text import plural

LARGEST_TEXT = 2**23
"""Maximum number of bytes of a file of text that is one document."""
PIECE_CHARACTERS = 2**18
"""Characters of each document of a larger file, approximately."""
NO_TOKEN = "yields no training token"
_CHUNK_BYTES = 2**20
_HEAD_CHARACTERS = 2**16


def read_text(
    file: BinaryIO, source: str, reading: Reading, *, is_known: Callable[[object], bool]
) -> Iterator[Document]:
    """Yield the text of a file as one document, or that of a file above ``LARGEST_TEXT`` bytes in pieces.

    A piece ends at the last line end of its ``PIECE_CHARACTERS`` characters; if there is none, at the last space, or
    else after them. The source of a piece is ``source:line``. The pieces joined are the text; pieces of white space
    alone are left out and counted.

    Args:
        file: The file, in UTF-8 with or without a byte-order mark.
        source: Names it in messages.
        reading: The pass over the source.
        is_known: Returns whether a value has fields of a record.

    Raises:
        InputError: It is empty, is not UTF-8 or has a NUL byte.
        UnknownShapeError: It looks like records.
    """
    chunks = _decoded(file, source)
    text = next(chunks, None)
    if text is None:
        raise InputError(f"{source} is empty: it {NO_TOKEN}.")
    text = text.removeprefix("\ufeff")
    if (kind := record_kind(text[:_HEAD_CHARACTERS], is_known)) is not None:
        raise UnknownShapeError(f"{source} looks like {kind} and not like text. Rename it to end with {_SUFFIX[kind]}.")
    parts = [text]
    num_bytes = len(text.encode())
    for chunk in chunks:
        parts.append(chunk)
        num_bytes += len(chunk.encode())
        if num_bytes > LARGEST_TEXT:
            yield from _pieces("".join(parts), chunks, source, reading)
            return
    text = "".join(parts)
    if not text.strip():
        raise InputError(f"{source} contains only white space: it {NO_TOKEN}.")
    yield Document(source, text=text)


_SUFFIX = {"JSON lines": ".jsonl", "a JSON list of records": ".json", "a table": ".csv or .tsv"}


def record_kind(head: str, is_known: Callable[[object], bool]) -> str | None:
    """Return the kind of records that the beginning of a text is; None if it is text.

    JSON lines: the first two lines with text, or the only one, are objects. A JSON list: of objects. A table: the
    first line is of names, two or more, among which are those of a record, and the second line has a delimiter too.
    """
    start = head.lstrip()
    lines = [line for line in start.splitlines(keepends=True)[:100] if line.strip()][:2]
    if start.startswith("{"):
        whole = lines if len(head) < _HEAD_CHARACTERS else [line for line in lines if line.endswith("\n")]
        values = [_json(line) for line in whole]
        return "JSON lines" if values and all(isinstance(value, dict) and value for value in values) else None
    if start.startswith("[") and start[1:].lstrip().startswith("{"):
        return "a JSON list of records" if start[1:].lstrip()[1:].lstrip().startswith('"') else None
    for delimiter in ",\t;":
        names = [name.strip().strip('"') for name in lines[0].split(delimiter)] if len(lines) > 1 else []
        are_names = len(names) > 1 and all(re.fullmatch(r"[\w.-]+", name) for name in names)
        if are_names and delimiter in lines[1] and is_known(dict.fromkeys(names, "")):
            return "a table"
    return None


def _json(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _decoded(file: BinaryIO, source: str) -> Iterator[str]:
    """Yield the text of a file in parts; nothing for an empty file."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    while raw := file.read(_CHUNK_BYTES):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(raw)
        except UnicodeDecodeError as error:
            raise InputError(not_utf8(source, error.object[error.start], offset - pending + error.start)) from None
        if (at := text.find("\0")) >= 0:
            place = offset - pending + len(text[:at].encode())
            raise InputError(f"{source} has a NUL byte at offset {place:,} and is not text. Remove it.")
        offset += len(raw)
        yield text
    if rest := decoder.getstate()[0]:
        raise InputError(not_utf8(source, rest[0], offset - len(rest)))


def _pieces(text: str, chunks: Iterator[str], source: str, reading: Reading) -> Iterator[Document]:
    line = 1
    number = blank = at = 0
    while True:
        while len(text) - at <= PIECE_CHARACTERS and (more := next(chunks, None)) is not None:
            text, at = text[at:] + more, 0
        if at == len(text):
            break
        end = _cut(text, at)
        piece = text[at:end]
        at = end
        if piece.strip():
            number += 1
            yield Document(f"{source}:{line}", text=piece)
        else:
            blank += 1
        line += piece.count("\n")
    if not number:
        raise InputError(f"{source} contains only white space: it {NO_TOKEN}.")
    reading.about.append(f"{source} is large and read as {plural(number, 'document')}, cut at line ends")
    if blank:
        reading.left_out.append(f"{plural(blank, 'piece')} of {source} with only white space left out")


def _cut(text: str, start: int) -> int:
    """Return the end of the piece that starts at ``start``."""
    limit = start + PIECE_CHARACTERS
    if len(text) <= limit:
        return len(text)
    return 1 + (text.rfind("\n", start, limit) if "\n" in text[start:limit] else text.rfind(" ", start, limit)) or limit
