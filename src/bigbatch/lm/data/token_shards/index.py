"""The index of shards of tokens: where each record is and how many tokens it has; made once, in the cache.

shards, read once → index → any token from the bytes of its record

A folder of an index has manifest.json and files of little-endian numbers, one for each record: ``end`` (int64: tokens
up to its end), ``key`` (uint64: the first 64 bits of the SHA-256 of its tokens and marks), ``offset`` and ``size``
(int64: its bytes in the shard). ``marks`` has a bit for each token, whether it is trained on; if only the first of each
record is not, there is no such file.
"""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bigbatch.errors import InputError
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.reading import Reading, ReadOptions
from bigbatch.lm.data.token_records import all_but_first, token_ids
from bigbatch.lm.data.token_shards.shards import RawRecord, TokenShards, located_documents
from bigbatch.lm.files import read_json, write_atomically
from bigbatch.lm.text import plural

MANIFEST = "manifest.json"
FORMAT = "bigbatch index of shards"
VERSION = 1
_COLUMNS: dict[str, np.dtype[Any]] = {
    "end": np.dtype("<i8"),
    "key": np.dtype("<u8"),
    "offset": np.dtype("<i8"),
    "size": np.dtype("<i8"),
}
_MARKS = "marks"
_BUFFERED = 1 << 14  # records in memory


@dataclass(frozen=True)
class IndexManifest:
    """What an index says about its shards.

    Attributes:
        rows: Records of each shard.
        tokens: Of all records.
        has_marks: Whether some tokens are not trained on, apart from the first of each record.
        largest_token: For a check against the tokenizer.
        fingerprint: SHA-256, in hex, of the tokens and marks.
        notes: About the data.
        left_out: Those of the notes that say what was left out.
        description: The source, for messages.
    """

    rows: tuple[int, ...]
    tokens: int
    has_marks: bool
    largest_token: int
    fingerprint: str
    notes: tuple[str, ...]
    left_out: tuple[str, ...]
    description: dict[str, Any]

    @property
    def documents(self) -> int:
        """Records of all shards."""
        return sum(self.rows)


@dataclass(frozen=True)
class Index:
    """The index of shards; the arrays are mapped from files.

    Attributes:
        manifest: What it says about the shards.
        ends: int64 ``[records]``, tokens up to the end of each record.
        keys: uint64 ``[records]``.
        offsets: int64 ``[records]``, first byte of each in its shard.
        sizes: int64 ``[records]``, bytes of each.
        marks: uint8, eight marks each, the first in the lowest bit; None without marks.
    """

    manifest: IndexManifest
    ends: NDArray[np.int64]
    keys: NDArray[np.uint64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    marks: NDArray[np.uint8] | None


def write_index(
    folder: Path,
    shards: TokenShards,
    *,
    skip_broken: bool,
    progress: Callable[[str, int, int], object] = lambda activity, done, total: None,
) -> None:
    """Read all shards once, and write their index into an empty folder.

    Args:
        folder: Receives the files.
        shards: Not compressed.
        skip_broken: Whether broken records and shards are left out and counted.
        progress: Receives an activity, the records done, and 0.

    Raises:
        InputError: A shard or a record cannot be read, or there is no record.
        OSError: A file cannot be written.
    """
    reading = Reading(ReadOptions(skip_broken=skip_broken))
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in (*_COLUMNS, _MARKS)}
        writer = _Writer(files, [0] * len(shards.shards))
        for raw, document in located_documents(shards, reading):
            writer.add(raw, document)
            if not len(writer.pending) and not writer.documents % _BUFFERED:
                progress(f"indexing {shards.name}", writer.documents, 0)
        writer.finish()
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    if not writer.documents:
        raise InputError(reading.first_broken or f"{shards.name} has nothing to train on.")
    if not writer.has_marks:
        (folder / _MARKS).unlink()
    reading.about.append(records_note(shards, writer.documents))
    reading.note_broken()
    manifest = IndexManifest(
        rows=tuple(writer.rows),
        tokens=writer.tokens,
        has_marks=writer.has_marks,
        largest_token=writer.largest_token,
        fingerprint=writer.digest.hexdigest(),
        notes=(*reading.about, *reading.left_out),
        left_out=tuple(reading.left_out),
        description={"data": shards.name},
    )
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    write_atomically(folder / MANIFEST, json.dumps(content).encode())


def read_index(folder: Path) -> Index:
    """Map an index.

    Raises:
        InputError: The folder is damaged.
    """
    try:
        content = read_json(folder / MANIFEST)
        if (content.pop("format"), content.pop("version")) != (FORMAT, VERSION):
            raise InputError(f"the index {folder} has another format. Delete the folder.")
        for name in ("rows", "notes", "left_out"):
            content[name] = tuple(content[name])
        manifest = IndexManifest(**content)
        number = manifest.documents
        ends, keys, offsets, sizes = (_mapped(folder / name, dtype, number) for name, dtype in _COLUMNS.items())
        marks = _mapped(folder / _MARKS, np.dtype("u1"), -(-manifest.tokens // 8)) if manifest.has_marks else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"the index in {folder} is damaged ({error}). Delete the folder.") from error
    return Index(manifest, ends, keys, offsets, sizes, marks)


def records_note(shards: TokenShards, number: int) -> str:
    """Return the note about the records that were read."""
    return f"{plural(number, 'record')} of tokens in {plural(len(shards.shards), 'shard')} from {shards.name}"


class _Writer:
    """Writes the columns of an index, some records at a time."""

    def __init__(self, files: Mapping[str, BinaryIO], rows: list[int]) -> None:
        self._files = files
        self.rows = rows
        self.pending: list[tuple[int, int, int, int]] = []
        self.documents = self.tokens = self.largest_token = 0
        self.has_marks = False
        self.digest = sha256()
        self._marks = bytearray()  # a byte for each token, up to 8 or those of the pending records

    def add(self, raw: RawRecord, document: Document) -> None:
        tokens = token_ids(document)
        self.rows[raw.shard] += 1
        self.documents += 1
        self.tokens += len(tokens)
        self.largest_token = max(self.largest_token, int(tokens.max()))
        self.has_marks |= document.trained is not None
        self._marks += document.trained or all_but_first(document)
        self.digest.update(bytes.fromhex(document.key))
        self.pending.append((self.tokens, int(document.key[:16], 16), raw.offset, len(raw.data)))
        if len(self.pending) >= _BUFFERED or len(self._marks) >= 1 << 24:
            self._flush(len(self._marks) // 8 * 8)

    def finish(self) -> None:
        self._flush(len(self._marks))

    def _flush(self, marks: int) -> None:
        for values, (name, dtype) in zip(zip(*self.pending, strict=True), _COLUMNS.items(), strict=False):
            self._files[name].write(np.array(values, dtype).tobytes())
        bits = np.packbits(np.frombuffer(self._marks[:marks], np.bool_), bitorder="little")
        self._files[_MARKS].write(bits.tobytes())
        self.pending = []
        self._marks = self._marks[marks:]


def _mapped(path: Path, dtype: np.dtype[Any], number: int) -> NDArray[Any]:
    if path.stat().st_size != number * dtype.itemsize:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes, not {number * dtype.itemsize:,}")
    return np.asarray(np.memmap(path, dtype, mode="r"))
