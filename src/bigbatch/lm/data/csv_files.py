"""Read records from files of CSV and TSV: one row a record, the first row the names of the columns, every cell text."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import BinaryIO

from bigbatch.errors import InputError
from bigbatch.lm.data.compression import not_utf8
from bigbatch.lm.data.json_files import LARGEST_RECORD, TOO_LARGE, Records
from bigbatch.lm.data.reading import Reading

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OTHERS = (";", "\t", ",", "|")
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def read_csv(
    file: BinaryIO, source: str, reading: Reading, *, suffix: str, check_columns: Callable[[list[str]], object]
) -> Records:
    """Yield each row as a mapping from the names of the columns to text, with ``source:line`` of its first line.

    Cells are never converted: ``NA``, ``null``, ``007`` and an empty cell stay as they are. Cells in double quotes may
    contain delimiters, line ends and doubled quotes. Blank lines are skipped, as in JSON lines. The delimiter is that
    of the suffix unless the first row has none and has another one.

    An open quote makes the rest of a file, or all up to the next quote, one cell. After a row that is not valid CSV,
    reading continues at the line after its first one, if broken records are skipped.

    Args:
        file: The file.
        source: Names it in messages.
        reading: The pass over the source.
        suffix: ``.csv`` or ``.tsv``.
        check_columns: Raises if the names of the columns are not those of records.

    Raises:
        InputError: The first row is not usable, or a row is broken and broken records are not skipped.
    """
    with closing(_Lines(file, source)) as lines:
        yield from _records(lines, source, reading, suffix, check_columns)


def _records(
    lines: _Lines, source: str, reading: Reading, suffix: str, check_columns: Callable[[list[str]], object]
) -> Records:
    head = next((line for line in lines if line.strip()), "")
    if not head:
        return
    delimiter = DELIMITERS[suffix]
    if delimiter not in head:
        delimiter = next((other for other in _OTHERS if other in head), delimiter)
    lines.put_back(head)
    rows = _rows(lines, delimiter)
    header, _ = next(rows)
    if isinstance(header, csv.Error):
        raise InputError(f"{source}: the names of the columns are not valid CSV: {header}.")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{source} has the column {twice!r} twice. Rename one of them.")
    check_columns(header)
    if delimiter != DELIMITERS[suffix]:
        reading.about.append(f"the cells of {source} are separated by {_NAMES[delimiter]}")
    for row, line in rows:
        place = f"{source}:{line}"
        if isinstance(row, csv.Error):
            reading.skip_record(InputError(f"{place}: not valid CSV: {row}{_reach(lines, reading)}."))
            lines.put_back_after_first()
        elif row and (problem := _problem(row, header, place, lines.in_row)) is not None:
            reading.skip_record(InputError(problem))
        elif row:
            yield dict(zip(header, row, strict=True)), place


def _rows(lines: _Lines, delimiter: str) -> Iterator[tuple[list[str] | csv.Error, int]]:
    """Yield the cells of each row, or its error, with the number of its first line."""
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.begin_row()
        first = lines.number + 1
        limit = csv.field_size_limit(LARGEST_RECORD)  # of the whole process
        try:
            row: list[str] | csv.Error = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            row = error
        finally:
            csv.field_size_limit(limit)
        yield row, first


def _reach(lines: _Lines, reading: Reading) -> str:
    """Return how far a row that is not valid and is skipped reached; nothing of others, and of a single line."""
    if not reading.options.skip_broken or lines.in_row < 2:
        return ""
    return (
        f" (its quotes reach over {lines.in_row:,} lines; those after the first are read again, as rows of their own)"
    )


def _problem(row: list[str], header: list[str], place: str, num_lines: int) -> str | None:
    """Return the sentence for a row that is not a record; None for others."""
    if len(row) != len(header):
        cells, columns = (f"{n} cell{'s' * (n != 1)}" for n in (len(row), len(header)))
        reach = f" over {num_lines:,} lines" if num_lines > 1 else ""
        return (
            f"{place}: the row has {cells}{reach}, and the first row {columns}. Put text with delimiters in double "
            "quotes."
        )
    text = "".join(row)
    if "\0" in text:
        return f"{place}: the row has a NUL byte, which is not text. Remove it."
    try:
        text.encode()
    except UnicodeEncodeError as error:  # an invalid byte, as half of a surrogate pair
        return not_utf8(place, ord(text[error.start]) - 0xDC00)
    return None


class _Lines(Iterable[str]):
    """Lines of a file as text; invalid bytes are kept as halves of surrogate pairs."""

    def __init__(self, file: BinaryIO, source: str) -> None:
        self._text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self._source = source
        self._next: list[str] = []
        self._row: list[str] = []
        self.number = 0  # lines returned so far

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._next.pop() if self._next else self._text.readline(LARGEST_RECORD + 1)
        if not line:
            raise StopIteration
        if len(line) > LARGEST_RECORD:
            raise InputError(f"{self._source}:{self.number + 1}: the line {TOO_LARGE}. Cut it into several.")
        self.number += 1
        self._row.append(line)
        return line

    @property
    def in_row(self) -> int:
        """How many lines were returned since `begin_row`."""
        return len(self._row)

    def begin_row(self) -> None:
        """Forget the lines that were returned."""
        self._row = []

    def put_back_after_first(self) -> None:
        """Return the lines since `begin_row` again, but for the first one."""
        for line in reversed(self._row[1:]):
            self.put_back(line)

    def close(self) -> None:
        """Release the file, which stays open."""
        self._text.detach()

    def put_back(self, line: str) -> None:
        """Return a line again as the next one."""
        self._next.append(line)
        self.number -= 1
