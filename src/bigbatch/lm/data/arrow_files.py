"""Read rows from Parquet files and Arrow files, of the file format or the stream format, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bigbatch.errors import InputError, first_line
from bigbatch.lm.data.json_files import Records
from bigbatch.lm.data.reading import Reading
from bigbatch.lm.data.records import without_nulls

BATCH_ROWS = 256
_ARROW_FILE = b"ARROW1"


def read_arrow(
    file: Any, source: str, reading: Reading, *, suffix: str, select: Callable[[list[str]], list[str]]
) -> Records:
    """Yield each row as a mapping from columns to values, null left out, with ``source:row``, from 1.

    Args:
        file: A file with random access.
        source: Names it in messages.
        reading: The pass over the source.
        suffix: ``.parquet`` or ``.arrow``.
        select: Returns those of the columns to read; raises if none of them is known.

    Raises:
        InputError: It cannot be read, or a row is broken and broken records are not skipped.
    """
    import pyarrow as pa

    batches = _parquet_batches if suffix == ".parquet" else _arrow_batches
    kind = "a Parquet file" if suffix == ".parquet" else "an Arrow file"

    def chosen(names: list[str]) -> list[str]:
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{source} has the column {twice!r} twice. Rename one of them.")
        return select(names)

    try:
        yield from rows_of(batches(file, chosen), source, reading)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"{source} cannot be read as {kind}: {first_line(error)}.") from None


def rows_of(batches: Iterator[Any], source: str, reading: Reading) -> Records:
    """Yield each row of record batches or tables as :func:`read_arrow` does."""
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            part = batch.slice(start, BATCH_ROWS)
            for row in _values(part, source, reading, number):
                number += 1
                if row is not None:
                    yield without_nulls(row), f"{source}:{number}"


def _values(part: Any, source: str, reading: Reading, number: int) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of a batch as Python objects; None for a row with text that is not UTF-8."""
    try:
        yield from part.to_pylist()
    except UnicodeDecodeError:
        pass
    else:
        return
    for index in range(part.num_rows):
        try:
            (row,) = part.slice(index, 1).to_pylist()
        except UnicodeDecodeError as error:
            place = f"{source}:{number + index + 1}"
            reading.skip_record(InputError(f"{place}: text is not UTF-8: {first_line(error)}."))
            row = None
        yield row


def _parquet_batches(file: Any, select: Callable[[list[str]], list[str]]) -> Iterator[Any]:
    import pyarrow.parquet as pq

    # A buffer reads the pages of a row group as they are needed, not all of the row group.
    with pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as parquet:
        names = select(list(parquet.schema_arrow.names))
        yield from parquet.iter_batches(batch_size=BATCH_ROWS, columns=names)


def _arrow_batches(file: Any, select: Callable[[list[str]], list[str]]) -> Iterator[Any]:
    import pyarrow as pa

    head = file.read(len(_ARROW_FILE))
    file.seek(0)
    if not head:
        return
    if head == _ARROW_FILE:
        with pa.ipc.open_file(file) as reader:
            names = select(list(reader.schema.names))
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index).select(names)
    else:
        with pa.ipc.open_stream(file) as reader:
            names = select(list(reader.schema.names))
            for batch in reader:
                yield batch.select(names)
