"""Write a token store: blocks of encoded documents → shards of Arrow files → manifest, and all of it or nothing."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bigbatch.lm.data.token_store import manifest as layout
from bigbatch.lm.data.token_store.manifest import Manifest, Shard
from bigbatch.lm.files import sync_folder, write_atomically

_ROW = (("tokens", pa.int64()), ("key", pa.uint64()), ("part", pa.int32()))


@dataclass(frozen=True)
class Block:
    """Encoded documents in order.

    Attributes:
        tokens: int32 ``[tokens]``, the documents concatenated.
        trained: bool ``[tokens]``, whether a token is trained on.
        weights: float32 ``[tokens]``, of each token's loss; None if they are ``trained`` as numbers.
        counts: int64 ``[documents]``, tokens of each.
        keys: uint64 ``[documents]``, the first 64 bits of the hash of each document's content.
        parts: int32 ``[documents]``, which part of its document each is, from 0: one may be encoded in several.
        continues: Whether the first tokens belong to the last document of the block before, which its count excludes.
        broken: Why documents of the batch were left out.
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    weights: NDArray[np.float32] | None
    counts: NDArray[np.int64]
    keys: NDArray[np.uint64]
    parts: NDArray[np.int32]
    continues: bool = False
    broken: tuple[str, ...] = ()

    @property
    def documents(self) -> int:
        """Documents that begin in the block."""
        return 0 if self.continues else int((self.parts == 0).sum())


class StoreWriter:
    """Writes the shards of a store into an existing, empty folder.

        with StoreWriter(folder) as writer:
            for block in blocks: writer.add(block)
        writer.finish(Manifest(...))

    Args:
        folder: Of the store.
        shard_tokens: A shard ends with the first block of documents after so many tokens, or before a block with
            weights if it has none.
    """

    def __init__(self, folder: Path, *, shard_tokens: int = layout.SHARD_TOKENS) -> None:
        self._folder = folder
        self._shard_tokens = shard_tokens
        self._shards: list[Shard] = []
        self._open: _ShardWriter | None = None
        self.documents = 0
        self.num_broken = 0
        self.first_broken = ""

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._open is not None:
            self._end_shard(discard=error is not None)

    def add(self, block: Block) -> None:
        """Append a block.

        Raises:
            OSError: The files cannot be written.
        """
        has_weights = block.weights is not None
        if self._open is not None and not block.continues:
            is_full = self._open.tokens >= self._shard_tokens
            if is_full or has_weights > self._open.has_weights:
                self._end_shard()
        if self._open is None:
            self._open = _ShardWriter(self._folder, len(self._shards), has_weights=has_weights)
        if len(block.counts):
            self._open.add(block)
        self.documents += block.documents
        self.num_broken += len(block.broken)
        self.first_broken = self.first_broken or next(iter(block.broken), "")

    def finish(self, manifest: Manifest) -> Manifest:
        """Write the manifest with the shards of this writer, and sync the folder. The store is complete then."""
        done = replace(manifest, shards=tuple(self._shards), documents=self.documents)
        write_atomically(self._folder / layout.MANIFEST, done.to_bytes())
        sync_folder(self._folder)
        return done

    def _end_shard(self, *, discard: bool = False) -> None:
        assert self._open is not None, "a shard is open"
        shard, self._open = self._open, None
        if discard:
            shard.discard()
        else:
            self._shards.append(shard.close())


class _ShardWriter:
    """Writer of one shard; holds at most a record batch of tokens."""

    def __init__(self, folder: Path, number: int, *, has_weights: bool) -> None:
        self.tokens = self.rows = 0
        self.has_weights = has_weights
        self._paths = folder / layout.token_file(number), folder / layout.document_file(number)
        weight = [_column("weight", pa.float32())] if has_weights else []
        self._token_schema = pa.schema([_column("token", pa.int32()), _column("trained", pa.bool_()), *weight])
        self._row_schema = pa.schema([_column(name, kind) for name, kind in _ROW])
        self._files: list[Any] = [pa.OSFile(str(path), "wb") for path in self._paths]
        schemas = self._token_schema, self._row_schema
        self._writers = [pa.ipc.new_file(file, schema) for file, schema in zip(self._files, schemas, strict=True)]
        self._pending: list[Block] = []
        self._pending_tokens = 0
        self._counts, self._keys = np.zeros(0, np.int64), np.zeros(0, np.uint64)
        self._parts = np.zeros(0, np.int32)
        self._digests = sha256(), sha256()  # of tokens, of documents

    def add(self, block: Block) -> None:
        self.tokens += len(block.tokens)
        self._pending.append(block)
        self._pending_tokens += len(block.tokens)
        if block.continues:
            self._counts[-1] += len(block.tokens)
        else:
            self._counts = np.concatenate([self._counts, block.counts])
            self._keys = np.concatenate([self._keys, block.keys])
            self._parts = np.concatenate([self._parts, block.parts])
        while self._pending_tokens >= layout.BATCH_TOKENS:
            self._write_tokens(layout.BATCH_TOKENS)
        while len(self._counts) > layout.BATCH_ROWS:  # the last document may continue
            self._write_rows(layout.BATCH_ROWS)

    def close(self) -> Shard:
        if self._pending_tokens:
            self._write_tokens(self._pending_tokens)
        self._write_rows(len(self._counts))
        for writer, file in zip(self._writers, self._files, strict=True):
            writer.close()
            file.close()
        for path in self._paths:
            _sync_file(path)
        sizes = [path.stat().st_size for path in self._paths]
        digest = sha256(b"".join(digest.digest() for digest in self._digests)).hexdigest()
        return Shard(self.tokens, self.rows, sizes[0], sizes[1], self.has_weights, digest)

    def discard(self) -> None:
        for file in self._files:
            file.close()

    def _write_tokens(self, number: int) -> None:
        """Write one record batch of the first ``number`` pending tokens."""
        parts: list[Block] = []
        missing = number
        while missing:
            block = self._pending.pop(0)
            if len(block.tokens) > missing:
                self._pending.insert(0, _part(block, missing, len(block.tokens)))
                block = _part(block, 0, missing)
            parts.append(block)
            missing -= len(block.tokens)
        self._pending_tokens -= number
        tokens = np.concatenate([part.tokens for part in parts])
        trained = np.concatenate([part.trained for part in parts])
        marks = pa.Array.from_buffers(pa.bool_(), number, [None, pa.py_buffer(np.packbits(trained, bitorder="little"))])
        columns = [_array(tokens, pa.int32()), marks]
        self._digests[0].update(_little_endian(tokens))
        self._digests[0].update(trained.tobytes())
        if self.has_weights:
            weights = np.concatenate([_weights(part) for part in parts])
            columns.append(_array(weights, pa.float32()))
            self._digests[0].update(_little_endian(weights))
        self._writers[0].write_batch(pa.record_batch(columns, schema=self._token_schema))

    def _write_rows(self, number: int) -> None:
        """Write one record batch of the first ``number`` pending documents."""
        counts, self._counts = np.split(self._counts, [number])
        keys, self._keys = np.split(self._keys, [number])
        parts, self._parts = np.split(self._parts, [number])
        arrays: tuple[NDArray[Any], ...] = counts, keys, parts
        self._digests[1].update(b"".join(map(_little_endian, arrays)))
        columns = [_array(array, kind) for array, (_, kind) in zip(arrays, _ROW, strict=True)]
        self._writers[1].write_batch(pa.record_batch(columns, schema=self._row_schema))
        self.rows += number


def _column(name: str, kind: Any) -> Any:
    return pa.field(name, kind, nullable=False)


def _array(values: NDArray[Any], kind: Any) -> Any:
    """Return an array of Arrow over the memory of one of NumPy. `pyarrow.array` imports pandas, if it is installed."""
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def _part(block: Block, start: int, stop: int) -> Block:
    weights = None if block.weights is None else block.weights[start:stop]
    return replace(block, tokens=block.tokens[start:stop], trained=block.trained[start:stop], weights=weights)


def _weights(block: Block) -> NDArray[np.float32]:
    return block.trained.astype(np.float32) if block.weights is None else block.weights


def _little_endian(array: NDArray[Any]) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def concatenated(blocks: Iterable[Block]) -> Block:
    """Return several blocks as one; for few documents, in memory."""
    found = list(blocks)
    has_weights = any(block.weights is not None for block in found)
    counts: list[int] = []
    for block in found:
        if block.continues:
            counts[-1] += len(block.tokens)
        else:
            counts += block.counts.tolist()
    return Block(
        np.concatenate([np.zeros(0, np.int32), *(block.tokens for block in found)]),
        np.concatenate([np.zeros(0, np.bool_), *(block.trained for block in found)]),
        np.concatenate([np.zeros(0, np.float32), *map(_weights, found)]) if has_weights else None,
        np.array(counts, np.int64),
        np.concatenate([np.zeros(0, np.uint64), *(block.keys for block in found if not block.continues)]),
        np.concatenate([np.zeros(0, np.int32), *(block.parts for block in found if not block.continues)]),
    )
