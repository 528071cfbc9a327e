"""Read records from files of JSON, CSV, Parquet and Arrow.

file → records (a dict and its file and line) → :mod:`bigbatch.lm.data.records` → Document
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from bigbatch.errors import InputError
from bigbatch.lm.data.arrow_files import read_arrow
from bigbatch.lm.data.compression import inner_suffix, open_content, open_seekable
from bigbatch.lm.data.csv_files import read_csv
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.json_files import Records, read_json, read_json_lines
from bigbatch.lm.data.messages import NO_TOKEN, kind_of, listing
from bigbatch.lm.data.reading import Reading, UnknownShapeError
from bigbatch.lm.data.records import ANY_COLUMNS, RecordColumns, to_document
from bigbatch.lm.data.token_records import TOKENS, has_token_list

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")


def read_record_file(path: Path, source: str, reading: Reading) -> Iterator[Document]:
    """Yield a document for each record of a file of ``RECORD_SUFFIXES``, compressed or not.

    Args:
        path: The file.
        source: Names it in messages.
        reading: The pass over the source.

    Raises:
        InputError: The file cannot be read, or has no record, or a record is broken and is not skipped.
        UnknownShapeError: Nothing in the file is known as a record.
    """
    num_broken = reading.num_broken
    num_documents = 0
    for document in to_documents(_records(path, source, reading), reading):
        num_documents += 1
        yield document
    if not num_documents and reading.num_broken == num_broken:
        raise InputError(f"{source} is empty: it {NO_TOKEN}.")


def to_documents(records: Records, reading: Reading) -> Iterator[Document]:
    """Yield a document for each record; a broken record is skipped and counted, or raised."""
    columns = reading.options.columns
    for record, place in records:
        try:
            document = to_document(record, place, columns)
        except InputError as error:
            reading.skip_record(error)
        else:
            yield document


def is_known(record: object, columns: RecordColumns = ANY_COLUMNS) -> bool:
    """Return whether a value has all fields of a shape of records."""
    if not isinstance(record, Mapping):
        return False
    return columns.have_shape(record) or (columns.reads_tokens and has_token_list(record))


def select_columns(names: list[str], *, source: str, columns: RecordColumns = ANY_COLUMNS) -> list[str]:
    """Return those columns of a table that records are read from.

    Raises:
        InputError: A column that a flag names is missing.
        UnknownShapeError: None of them is known.
    """
    try:
        columns.check(names, source)
    except InputError as error:
        raise (error if columns.are_named else UnknownShapeError(str(error))) from None
    return columns.needed(names)


def _records(path: Path, source: str, reading: Reading) -> Records:
    suffix = inner_suffix(path.name)
    select = partial(select_columns, source=source, columns=reading.options.columns)
    if suffix == ".json":
        known = partial(is_known, columns=reading.options.columns)
        records = read_json(partial(open_content, path, source), source, reading, known)
        yield from _known_records(records, reading.options.columns)
    elif suffix in (".parquet", ".arrow"):
        with open_seekable(path, source) as file:
            yield from read_arrow(file, source, reading, suffix=suffix, select=select)
    else:
        with open_content(path, source) as file:
            if suffix in (".csv", ".tsv"):
                yield from read_csv(file, source, reading, suffix=suffix, check_columns=select)
            else:
                yield from read_json_lines(file, source, reading)


def _known_records(records: Records, columns: RecordColumns) -> Records:
    """Yield records; raise if the first has no field of any: a .json file may hold anything."""
    fields = columns.fields - {TOKENS}
    for number, (record, place) in enumerate(records):
        if number == 0 and not (isinstance(record, Mapping) and (fields & record.keys() or has_token_list(record))):
            what = f"the record has {listing(record)}" if isinstance(record, Mapping) else f"it is {kind_of(record)}"
            raise UnknownShapeError(f"{place}: {what}. {columns.expected}")
        yield record, place
