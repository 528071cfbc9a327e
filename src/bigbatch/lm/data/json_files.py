r"""Read records from files of JSON: one record a line, or a list of records, or one object.

a.jsonl                                   → the value of each line
a.json: [ {…}, {…} ]                      → the values of the list, one at a time
a.json: {…} \n {…}                         → the value of each line
a.json: {"data": [ {…}, {…} ], …}         → the values of the only list of objects, unless the object is a record
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

from bigbatch.errors import InputError, first_line
from bigbatch.lm.data.compression import decode_utf8, not_utf8
from bigbatch.lm.data.reading import Reading, UnknownShapeError

LARGEST_RECORD = 2**26
"""Maximum number of bytes of a record, and of a JSON file that is one object."""
CHUNK_BYTES = 2**20
TOO_LARGE = f"has more than {LARGEST_RECORD // 2**20} MiB"
_LONGEST_TOKEN = 64  # characters: an error further from the end of what was read so far is not due to that end
_BOM = b"\xef\xbb\xbf"

Records = Iterator[tuple[object, str]]
"""Values of records, each with its place: the file, and the number of its line or of the record."""


class _KeyTwiceError(ValueError):
    """A key occurs twice in one object."""


def read_json_lines(file: BinaryIO, source: str, reading: Reading) -> Records:
    r"""Yield the value of each line that is not blank, with ``source:line``.

    Lines end at \n only: JSON strings may contain the separators of str.splitlines.

    Raises:
        InputError: A line is not UTF-8, not JSON or too long, and broken records are not skipped.
    """
    number = offset = 0
    while raw := file.readline(LARGEST_RECORD + 1):
        number += 1
        place = f"{source}:{number}"
        start = offset
        offset += len(raw)
        if number == 1 and raw.startswith(_BOM):
            raw, start = raw.removeprefix(_BOM), len(_BOM)
        if len(raw) > LARGEST_RECORD:
            while not raw.endswith(b"\n") and (raw := file.readline(CHUNK_BYTES)):
                offset += len(raw)
            reading.skip_record(InputError(f"{place}: the record {TOO_LARGE}. Cut it into several."))
        elif raw.strip():
            try:
                value = _parse(decode_utf8(raw, place, start), place)
            except InputError as error:
                reading.skip_record(error)
            else:
                yield value, place


def read_json(
    open_file: Callable[[], AbstractContextManager[BinaryIO]],
    source: str,
    reading: Reading,
    is_known: Callable[[object], bool],
) -> Records:
    """Yield the records of a ``.json`` file, with ``source:number``: the number of the record, or of its line.

    Args:
        open_file: Opens the file; it may be called several times.
        source: Names the file in messages.
        reading: The pass over the source.
        is_known: Returns whether a value has fields of a record.

    Raises:
        InputError: It is not JSON, or a record is broken and broken records are not skipped.
        UnknownShapeError: It is not JSON of records.
    """
    with open_file() as file:
        first, second = _line_with_text(file), _line_with_text(file)
    first = first.removeprefix(_BOM).strip()
    start = first[:1]
    with open_file() as file:
        if start == b"[":
            yield from _read_list(file, source, reading)
        elif start == b"{" and second and (_is_json(first) or _is_json(second.strip())):
            yield from read_json_lines(file, source, reading)
        elif start == b"{":
            yield from _records_of(_read_object(file, source), source, reading, is_known)
        elif first:
            decode_utf8(first, source)
            raise UnknownShapeError(
                f"{source} is not JSON of records: it starts with {first[:1].decode('ascii', 'replace')!r}, and not "
                "with the [ of a list or the { of an object."
            )


def _line_with_text(file: BinaryIO) -> bytes:
    """Return the next line that is not blank, or the beginning of one that is too long; empty at the end."""
    while (raw := file.readline(LARGEST_RECORD + 1)) and not raw.removeprefix(_BOM).strip():
        pass
    return raw


def _is_json(line: bytes) -> bool:
    """Return whether a line is a whole JSON object; a comma at its end makes it a part of a larger value."""
    try:
        return line.startswith(b"{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_object(file: BinaryIO, source: str) -> object:
    raw = file.read(LARGEST_RECORD + 1)
    if len(raw) > LARGEST_RECORD:
        raise InputError(f"{source} is one JSON object and {TOO_LARGE}. Save its records as JSON lines (.jsonl).")
    return _parse(decode_utf8(raw, source).removeprefix("\ufeff"), source)


def _records_of(value: object, source: str, reading: Reading, is_known: Callable[[object], bool]) -> Records:
    """Yield an object that is a record, or the entries of its only list of objects."""
    assert isinstance(value, dict), "it starts with a brace"
    if is_known(value):
        yield value, f"{source}:1"
        return
    lists = {
        name: entries
        for name, entries in value.items()
        if isinstance(entries, list) and entries and all(isinstance(entry, dict) for entry in entries)
    }
    names = ", ".join(map(repr, lists or value)) or "no field"
    if not lists:
        raise UnknownShapeError(f"{source} is one JSON object with {names}, which is no record and has no list of any.")
    if len(lists) > 1:
        raise InputError(
            f"{source} has several lists of records, {names}: save the one to train on as a file of its own."
        )
    ((name, entries),) = lists.items()
    reading.about.append(f"the records of {source} are those of its field {name!r}")
    yield from ((entry, f"{source}:{number}") for number, entry in enumerate(entries, 1))


def _read_list(file: BinaryIO, source: str, reading: Reading) -> Records:
    """Yield the entries of a JSON list, of which only a part is in memory."""
    text = _Text(file, source)
    text.skip("[")
    number = 0
    while text.peek() != "]" or number:
        number += 1
        place = f"{source}:{number}"
        try:
            value = text.value(place)
        except _KeyTwiceError as error:
            reading.skip_record(InputError(f"{place}: not valid JSON: {error}."))
        else:
            yield value, place
        if text.peek() == "]":
            break
        text.skip(",", after=place)
    text.skip("]")
    if text.peek():
        raise InputError(
            f"{source} has more after its list of records. Save it as JSON lines (.jsonl), or as one list."
        )


class _Text:
    """Decoded text of a file, of which the part from the current position on is read as needed."""

    def __init__(self, file: BinaryIO, source: str) -> None:
        self._file = file
        self._source = source
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._offset = 0
        self._ended = False

    def peek(self) -> str:
        """Skip white space and return the next character; empty at the end."""
        while True:
            rest = len(self._text)
            while self._at < rest and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < rest or not self._read():
                return self._text[self._at : self._at + 1]

    def skip(self, character: str, *, after: str | None = None) -> None:
        """Skip white space and one character, which must be ``character``."""
        found = self.peek()
        if found != character:
            place = self._source if after is None else f"{self._source}, after record {after.rpartition(':')[2]}"
            what = f"{found!r} instead of {character!r}" if found else f"the end instead of {character!r}"
            raise InputError(f"{place}: not valid JSON: {what}.")
        self._at += 1

    def value(self, place: str) -> object:
        """Return the next JSON value.

        Raises:
            InputError: It is not valid.
            _KeyTwiceError: An object has a key twice; the value is skipped.
        """
        self.peek()
        while True:
            twice = None
            try:
                try:
                    value, end = _STRICT.raw_decode(self._text, self._at)
                except _KeyTwiceError as error:
                    twice = error
                    value, end = _PLAIN.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._may_continue(error):
                    raise InputError(f"{place}: not valid JSON: {error.msg}.") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"{place}: JSON that Python cannot read: {first_line(error)}.") from None
            else:
                # More text could continue a number: 1 may be the start of 1.5.
                is_whole = self._text[end - 1] in '"]}' or end + _LONGEST_TOKEN <= len(self._text)
                if is_whole or self._ended:
                    self._at = end
                    if twice is not None:
                        raise twice
                    return value
            if len(self._text) - self._at > LARGEST_RECORD:
                raise InputError(f"{place}: the record {TOO_LARGE}. Cut it into several.")
            self._read()

    def _may_continue(self, error: json.JSONDecodeError) -> bool:
        """Return whether the text read so far ends within the value."""
        return not self._ended and (
            error.msg.startswith("Unterminated string") or error.pos + _LONGEST_TOKEN > len(self._text)
        )

    def _read(self) -> bool:
        """Read more text, as much as is left of the current value; return whether there was any."""
        if self._ended:
            return False
        raw = self._file.read(max(CHUNK_BYTES, len(self._text) - self._at))
        self._ended = not raw
        try:
            more = self._decoder.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            raise InputError(not_utf8(self._source, error.object[error.start])) from None
        self._text = self._text[self._at :] + more
        self._at = 0
        return bool(more) or not self._ended


def _parse(line: str, place: str) -> object:
    line = line.rstrip()  # with a newline, an error at the end would be reported in column 1 of the next line
    try:
        # What decode() calls; it takes twice as long, and is left to find out what is wrong with a line.
        value, end = _scan(line, 0)
        if end == len(line):
            return value
    except (StopIteration, ValueError, RecursionError):
        pass
    try:
        return _STRICT.decode(line)
    except json.JSONDecodeError as error:
        line_number = f"line {error.lineno}, " if error.lineno > 1 else ""
        what = error.msg.removesuffix(" at")  # some messages of json end with it
        raise InputError(f"{place}: not valid JSON: {what} at {line_number}column {error.colno}.") from None
    except _KeyTwiceError as error:
        raise InputError(f"{place}: not valid JSON: {error}.") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested thousands deep
        raise InputError(f"{place}: JSON that Python cannot read: {first_line(error)}.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _KeyTwiceError(f"the key {twice!r} occurs twice in one object")
    return found


_PLAIN = json.JSONDecoder()
_STRICT = json.JSONDecoder(object_pairs_hook=_unique)
_scan: Callable[[str, int], tuple[object, int]] = _STRICT.scan_once  # type: ignore[attr-defined]
