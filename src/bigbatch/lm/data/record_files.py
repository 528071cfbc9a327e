"""Read records from JSON lines and Parquet.

file → records (a dict and its file and line) → :mod:`bigbatch.lm.data.records` → Document
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bigbatch.errors import InputError, first_line
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.records import ANY_COLUMNS, RecordColumns, rows_to_documents, to_document, valid_document

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".parquet")


def read_records(
    path: Path, source: str, *, broken: list[str] | None = None, columns: RecordColumns = ANY_COLUMNS
) -> Iterator[Document]:
    """Yield a document for each record of a file of ``RECORD_SUFFIXES``; ``source`` names the file in messages.

    Args:
        path: The file.
        source: Name of the file in messages.
        broken: List to which the error of each invalid record is appended, which is then skipped; None to raise it.
        columns: The columns to read, if not those of a known shape.

    Raises:
        InputError: The file cannot be read, or :func:`~bigbatch.lm.data.records.to_document` refuses a record.
        OSError: The operating system refuses the file.
    """
    read = _read_parquet if path.suffix.lower() == ".parquet" else _read_json_lines
    return read(path, source, broken, columns)


def _read_json_lines(path: Path, source: str, broken: list[str] | None, columns: RecordColumns) -> Iterator[Document]:
    with path.open("rb") as file:
        offset = 0
        # Split at \n only: JSON strings may contain the other separators of str.splitlines.
        for number, raw in enumerate(file, 1):
            if raw.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip():
                yield from valid_document(partial(_read_line, raw, f"{source}:{number}", offset, columns), broken)
            offset += len(raw)


def _read_line(raw: bytes, place: str, offset: int, columns: RecordColumns) -> Document:
    line = decode_utf8(raw, place, offset)
    return to_document(_parse(line.removeprefix("\ufeff") if offset == 0 else line, place), place, columns)


def _parse(line: str, place: str) -> object:
    try:
        return json.loads(
            line.rstrip()
        )  # with a newline, an error at the end would be reported in column 1 of the next line
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not valid JSON: {error.msg} at column {error.colno}.") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested thousands deep
        raise InputError(f"{place}: JSON that Python cannot read: {first_line(error)}.") from None


def _read_parquet(path: Path, source: str, broken: list[str] | None, columns: RecordColumns) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names: list[str] = file.schema_arrow.names
            rows = (row for batch in file.iter_batches(columns=columns.needed(names)) for row in batch.to_pylist())
            yield from rows_to_documents(rows, names, source, broken=broken, columns=columns)
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
