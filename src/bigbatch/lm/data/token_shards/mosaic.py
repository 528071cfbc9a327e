"""Shards in the format of MosaicML Streaming (MDS, version 2).

    FOLDER/index.json       for each shard: file, columns with encodings and sizes, number of samples, compression
    FOLDER/shard.00000.mds  uint32 samples, uint32 offset of each sample and of the end, header, samples

A sample has a uint32 size for each column without a fixed one, and then the values. The library itself,
mosaicml-streaming 0.13, cannot be installed with the versions of transformers and numpy that bigbatch needs; files that
it wrote are read in the tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np

from bigbatch.errors import InputError, first_line
from bigbatch.lm.data.reading import Reading
from bigbatch.lm.data.token_records import LABELS, MASKS, TOKENS
from bigbatch.lm.data.token_shards.shards import RawRecord
from bigbatch.lm.data.token_shards.storage import Storage, StoredFile

INDEX = "index.json"
_CODECS = {"zstd": "zstd", "gz": "gzip", "bz2": "bz2", "br": "brotli", "snappy": "snappy"}  # names of pyarrow
_READ = ("input_ids", TOKENS, LABELS, *MASKS)
_DTYPES = {8: "u1", 9: "i1", 16: "u2", 17: "i2", 32: "u4", 33: "i4", 64: "u8", 65: "i8"}  # codes of integers
_U32 = np.dtype("<u4")


@dataclass(frozen=True)
class _Column:
    name: str
    encoding: str
    size: int | None


@dataclass(frozen=True)
class _Shard:
    """What index.json says about a shard."""

    file: StoredFile
    samples: int
    columns: tuple[_Column, ...]
    compression: str | None
    raw_bytes: int


class MosaicShards:
    """The shards that an index.json lists.

    Args:
        storage: The folder of the index.
        name: The source, as the user named it.

    Raises:
        InputError: The index cannot be read, lists other shards than MDS, or a file is missing.
    """

    kind = "MosaicML Streaming shards"

    def __init__(self, storage: Storage, name: str) -> None:
        self.name = name
        self.storage = storage
        self._shards = _read_index(storage)

    @property
    def shards(self) -> tuple[StoredFile, ...]:
        """The files, in order."""
        return tuple(shard.file for shard in self._shards)

    @cached_property
    def is_in_place(self) -> bool:
        """Whether no shard is compressed."""
        return all(shard.compression is None for shard in self._shards)

    def raw(self, reading: Reading) -> Iterator[RawRecord]:
        """Yield the samples of every shard; memory is bounded by a sample, or by a shard if it is compressed.

        Raises:
            InputError: A shard is damaged, and broken files are not skipped.
        """
        for number, shard in enumerate(self._shards):
            try:
                yield from self._samples(number, shard)
            except InputError as error:
                reading.skip_file(error, is_only=len(self._shards) == 1)

    def decode(self, shard: int, data: bytes, source: str) -> Mapping[str, Any]:
        """Return the columns of a sample that tokens are read from.

        Raises:
            InputError: The sample is damaged, or one of them has an encoding that holds no tokens.
        """
        columns = self._shards[shard].columns
        place = 4 * sum(column.size is None for column in columns)
        sizes = iter(np.frombuffer(data[:place], _U32).tolist())
        found = {}
        for column in columns:
            size = next(sizes, 0) if column.size is None else column.size
            if column.name in _READ:
                found[column.name] = _decoded(column, data[place : place + size], source)
            place += size
        if place != len(data):
            raise InputError(f"{source} is damaged: the sample has {len(data):,} bytes, and its columns {place:,}.")
        return found

    def _samples(self, number: int, shard: _Shard) -> Iterator[RawRecord]:
        where = self.storage.name_of(shard.file.path)
        with self.storage.open(shard.file.path) as file:
            read: Callable[[int], bytes] = file.read
            if shard.compression is not None:
                read = _Bytes(_decompressed(file.read(), shard, where)).read
            samples = int.from_bytes(read(4), "little")
            if samples != shard.samples:
                raise InputError(f"{where} is damaged: it has {samples:,} samples, and {INDEX} says {shard.samples:,}.")
            table, first = read(4 * (samples + 1)), 4 * (samples + 2)
            offsets = np.frombuffer(table[: len(table) // 4 * 4], _U32).astype(np.int64)
            if len(offsets) != samples + 1 or offsets[0] < first or (np.diff(offsets) < 0).any():
                raise InputError(f"{where} is damaged: its table of samples is.")
            if offsets[-1] != shard.raw_bytes:
                raise InputError(
                    f"{where} is damaged: its samples end at {offsets[-1]:,}, and {INDEX} says {shard.raw_bytes:,}."
                )
            read(int(offsets[0]) - first)  # the header, which repeats the columns
            for row in range(samples):
                size = int(offsets[row + 1] - offsets[row])
                data = read(size)
                if len(data) != size:
                    raise InputError(f"{where} is damaged: it ends within sample {row + 1:,}.")
                yield RawRecord(number, int(offsets[row]), data, f"{where}:{row + 1}")


class _Bytes:
    """Bytes that are read in order."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def read(self, size: int) -> bytes:
        self._at += size
        return self._data[self._at - size : self._at]


def _read_index(storage: Storage) -> tuple[_Shard, ...]:
    where = storage.name_of(path := f"{storage.root}/{INDEX}")
    raw = storage.read(path)
    files = {file.path: file for file in storage.files() if file.path.startswith(f"{storage.root}/")}
    found = []
    try:
        for entry in json.loads(raw)["shards"]:
            if entry["format"] != "mds" or entry["version"] != 2:
                raise InputError(
                    f"{where} lists shards of the format {entry['format']!r}, version {entry['version']}, and bigbatch "
                    "reads 'mds', version 2."
                )
            compression = entry["compression"].partition(":")[0] if entry["compression"] else None
            if compression is not None and compression not in _CODECS:
                raise InputError(f"{where} lists shards with the compression {compression!r}, which is not supported.")
            stored = entry["zip_data"] if compression else entry["raw_data"]
            basename, path = stored["basename"], f"{storage.root}/{stored['basename']}"
            # A web server does not list its files.
            file = files.get(path) if files else StoredFile(path, int(stored["bytes"]), sha256(raw).hexdigest())
            if file is None:
                raise InputError(f"{where} lists {basename}, which does not exist.")
            names = zip(entry["column_names"], entry["column_encodings"], entry["column_sizes"], strict=True)
            columns = tuple(_Column(str(name), str(encoding), size or None) for name, encoding, size in names)
            _check_columns(columns, where)
            found.append(_Shard(file, int(entry["samples"]), columns, compression, int(entry["raw_data"]["bytes"])))
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{where} cannot be read as the index of MosaicML Streaming ({first_line(error)}).") from None
    if not found:
        raise InputError(f"{where} lists no shard.")
    return tuple(found)


def _check_columns(columns: tuple[_Column, ...], where: str) -> None:
    names = [column.name for column in columns]
    if not {"input_ids", TOKENS} & set(names):
        found = ", ".join(map(repr, names))
        raise InputError(
            f"{where} lists the columns {found}, and tokens are read from 'input_ids' or 'tokens'. Write shards of "
            "tokens, or save the text as .jsonl or .parquet."
        )


def _decompressed(data: bytes, shard: _Shard, where: str) -> bytes:
    if shard.compression in ("gz", "bz2"):
        import bz2
        import gzip

        decompress = gzip.decompress if shard.compression == "gz" else bz2.decompress
        try:
            return decompress(data)
        except (OSError, EOFError, ValueError) as error:
            raise InputError(f"{where} is damaged: {first_line(error)}.") from None
    import pyarrow as pa

    assert shard.compression is not None, "called for compressed shards"
    try:
        return pa.Codec(_CODECS[shard.compression]).decompress(data, shard.raw_bytes, asbytes=True)  # type: ignore[no-any-return]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{where} is damaged: {first_line(error)}.") from None


def _decoded(column: _Column, data: bytes, source: str) -> Any:
    encoding, _, arguments = column.encoding.partition(":")
    try:
        if encoding == "bytes":
            return data
        if encoding == "json":
            return json.loads(data)
        if encoding == "ndarray":
            return _array(arguments, data)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{source} is damaged: its column {column.name!r} is ({first_line(error)}).") from None
    raise InputError(
        f"{source}: the column {column.name!r} has the encoding {column.encoding!r}, and tokens are read from "
        "'ndarray', 'bytes' (int64) or 'json'."
    )


def _array(arguments: str, data: bytes) -> Any:
    """Decode an array: dtype and shape are in the encoding, or else in front of the values, in that order."""
    dtype_name, _, shape = arguments.partition(":")
    if dtype_name:
        dtype = np.dtype(dtype_name).newbyteorder("<")
    else:
        dtype, data = np.dtype(f"<{_DTYPES[data[0]]}"), data[1:]
    if shape:
        return np.frombuffer(data, dtype).reshape([int(size) for size in shape.split(",")])
    axes, width = data[0] >> 2, 1 << (data[0] & 3)
    sizes = np.frombuffer(data[1 : 1 + axes * width], f"<u{width}")
    return np.frombuffer(data[1 + axes * width :], dtype).reshape(sizes.astype(np.int64))
