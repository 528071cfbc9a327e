"""Shards of webdataset: tar archives, in which consecutive files of one name are a record.

00017.input_ids.npy, 00017.labels.npy   a column in each file: .npy or .json
00017.json                              {"input_ids": […], "labels": […]}
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

from bigbatch.errors import InputError, first_line
from bigbatch.lm.data.reading import Reading, UnknownShapeError
from bigbatch.lm.data.token_records import LABELS, MASKS, TOKENS
from bigbatch.lm.data.token_shards.shards import RawRecord
from bigbatch.lm.data.token_shards.storage import Storage, StoredFile

EXTRA = "webdataset"
_BLOCK = 512  # bytes; every file of an archive ends on a multiple
_READ = ("input_ids", TOKENS, LABELS, *MASKS)
_FORMATS = ("npy", "json")


class TarShards:
    """The tar archives of a source.

    Args:
        storage: Where they are.
        name: The source, as the user named it.
        shards: The archives, in order.

    Raises:
        InputError: The library webdataset is not installed, or the first archive has no record of tokens.
    """

    kind = "webdataset shards"
    is_in_place = True

    def __init__(self, storage: Storage, name: str, shards: tuple[StoredFile, ...]) -> None:
        self.name = name
        self.storage = storage
        self.shards = shards
        try:
            from webdataset.autodecode import decoders
            from webdataset.tariterators import base_plus_ext
        except ImportError:
            raise InputError(
                f"{name} cannot be read without the library webdataset. Install it: pip install 'bigbatch[{EXTRA}]'. "
                "If it is an archive of files, unpack it and pass the folder."
            ) from None
        self._decoders: Mapping[str, Any] = decoders
        self._split_name = base_plus_ext
        self._check_first()

    def raw(self, reading: Reading) -> Iterator[RawRecord]:
        """Yield the records of every archive; memory is bounded by a record.

        Raises:
            InputError: An archive is damaged, and broken files are not skipped.
        """
        for number, shard in enumerate(self.shards):
            try:
                yield from self._records(number, shard)
            except InputError as error:
                reading.skip_file(error, is_only=len(self.shards) == 1)

    def decode(self, shard: int, data: bytes, source: str) -> Mapping[str, Any]:
        """Return the columns of a record that tokens are read from; no other file of it is decoded.

        Raises:
            InputError: It is damaged.
        """
        columns: dict[str, Any] = {}
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
                for member in archive:
                    column, suffix = self._column(member.name)
                    if suffix not in _FORMATS or (column and column not in _READ):
                        continue
                    if column in columns:
                        raise InputError(f"{source} has {column!r} twice.")
                    content = archive.extractfile(member)
                    value = self._decoders[suffix](b"" if content is None else content.read())
                    if column:
                        columns[column] = value
                    elif suffix == "json" and isinstance(value, Mapping):
                        columns |= value
                    elif suffix == "npy":
                        columns["input_ids"] = value
        except InputError:
            raise
        except (tarfile.TarError, ValueError, OSError, EOFError) as error:
            raise InputError(f"{source} cannot be read: {first_line(error)}.") from None
        return columns

    def _column(self, path: str) -> tuple[str, str]:
        """Return the column and the format of a file: ``("input_ids", "npy")`` for ``00017.input_ids.npy``."""
        _, extensions = self._split_name(path)
        column, _, suffix = (extensions or "").lower().rpartition(".")
        return column, suffix

    def _records(self, number: int, shard: StoredFile) -> Iterator[RawRecord]:
        where = self.storage.name_of(shard.path)
        with self.storage.open(shard.path) as file:
            for key, start, stop in self._groups(file, where):
                file.seek(start)
                data = file.read(stop - start)
                if len(data) != stop - start:
                    raise InputError(f"{where} ends within the record {key}.")
                yield RawRecord(number, start, data, f"{where}:{key}")

    def _groups(self, file: Any, where: str) -> Iterator[tuple[str, int, int]]:
        """Yield the name of each record of an archive, and its first and last byte."""
        group: tuple[str, int, int] | None = None
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    archive.members = []  # type: ignore[attr-defined]  # else, it keeps all of them
                    key = self._split_name(member.name)[0] if member.isreg() else None
                    if key is None or member.name.startswith("__"):
                        continue
                    stop = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                    if group is not None and group[0] == key:
                        group = key, group[1], stop
                        continue
                    if group is not None:
                        yield group
                    group = key, member.offset, stop
        except (tarfile.TarError, EOFError) as error:
            raise InputError(f"{where} cannot be read as a tar archive: {first_line(error)}.") from None
        if group is not None:
            yield group

    def _check_first(self) -> None:
        first = next(self._records(0, self.shards[0]), None)
        if first is None:
            raise UnknownShapeError(f"{self.storage.name_of(self.shards[0].path)} has no record of webdataset.")
        if not {"input_ids", TOKENS} & self.decode(0, first.data, first.source).keys():
            with tarfile.open(fileobj=io.BytesIO(first.data), mode="r:") as archive:
                names = ", ".join(member.name for member in archive)
            raise UnknownShapeError(
                f"{first.source} has no tokens, which are read from NAME.input_ids.npy, NAME.tokens.npy or NAME.json: "
                f"it has {names}. Unpack other archives, and pass the folder."
            )
