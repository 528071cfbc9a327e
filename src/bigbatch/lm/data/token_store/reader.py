"""Read the tokens of one or more stores from memory-mapped files, as one sequence."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bigbatch.errors import InputError, first_line
from bigbatch.lm.data.token_store import manifest as layout
from bigbatch.lm.data.token_store.manifest import Manifest
from bigbatch.lm.data.token_store.writer import Block


@dataclass(frozen=True)
class Span:
    """Consecutive tokens.

    Attributes:
        tokens: int32 ``[tokens]``.
        trained: bool ``[tokens]``.
        weights: float32 ``[tokens]``; None if they are ``trained`` as numbers.
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    weights: NDArray[np.float32] | None


@dataclass(frozen=True)
class Rows:
    """Consecutive encoded documents; the arrays are as in a `Block`.

    Attributes:
        counts: Tokens of each.
        keys: Of their content.
        parts: Which part of its document each is.
    """

    counts: NDArray[np.int64]
    keys: NDArray[np.uint64]
    parts: NDArray[np.int32]

    def __getitem__(self, chosen: NDArray[np.bool_]) -> "Rows":
        """Return the chosen ones."""
        return Rows(self.counts[chosen], self.keys[chosen], self.parts[chosen])


class TokenReader(Protocol):
    """A sequence of tokens, cut in encoded documents."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""

    @property
    def num_rows(self) -> int:
        """Encoded documents."""

    def read(self, start: int, stop: int) -> Span:
        """Return the tokens from ``start`` to ``stop``, exclusive."""

    def read_many(self, bounds: Sequence[tuple[int, int]]) -> list[Span]:
        """Return the tokens of several bounds, each as `read` does."""

    def marks(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return whether each token from ``start`` to ``stop``, exclusive, is trained on."""

    def rows(self) -> Iterator[Rows]:
        """Yield the documents in order, many at a time."""


class _LocalReader(ABC):
    """A reader whose tokens are on this machine: several bounds are read one after the other."""

    @abstractmethod
    def read(self, start: int, stop: int) -> Span:
        """Return the tokens from ``start`` to ``stop``, exclusive."""

    def read_many(self, bounds: Sequence[tuple[int, int]]) -> list[Span]:
        """Return the tokens of several bounds."""
        return [self.read(start, stop) for start, stop in bounds]

    def marks(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return whether each token from ``start`` to ``stop``, exclusive, is trained on."""
        return self.read(start, stop).trained


class MemoryTokens(_LocalReader):
    """Tokens in memory."""

    def __init__(self, block: Block) -> None:
        self._block = block

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return len(self._block.tokens)

    @property
    def num_rows(self) -> int:
        """Encoded documents."""
        return len(self._block.counts)

    def read(self, start: int, stop: int) -> Span:
        """Return the tokens from ``start`` to ``stop``, exclusive."""
        block = self._block
        weights = None if block.weights is None else block.weights[start:stop]
        return Span(block.tokens[start:stop], block.trained[start:stop], weights)

    def rows(self) -> Iterator[Rows]:
        """Yield the documents."""
        yield Rows(self._block.counts, self._block.keys, self._block.parts)


class StoredTokens(_LocalReader):
    """The tokens of stores, one after the other. The files are mapped, not read: only what is used is in memory.

    Args:
        stores: (folder, manifest) of each.

    Raises:
        InputError: A file is not what the manifest says.
    """

    def __init__(self, stores: Sequence[tuple[Path, Manifest]]) -> None:
        shards = [(folder, i, shard) for folder, manifest in stores for i, shard in enumerate(manifest.shards)]
        self._shards = [_Shard(folder, i, shard.has_weights) for folder, i, shard in shards]
        for (folder, i, shard), found in zip(shards, self._shards, strict=True):
            if (found.num_tokens, found.num_rows) != (shard.tokens, shard.rows):
                raise InputError(
                    f"{folder / layout.token_file(i)} has {found.num_tokens:,} tokens, and its manifest says "
                    f"{shard.tokens:,}. Delete the folder and tokenize the data again."
                )
        self._ends = np.cumsum([shard.tokens for _, _, shard in shards], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def num_rows(self) -> int:
        """Encoded documents."""
        return sum(shard.num_rows for shard in self._shards)

    def read(self, start: int, stop: int) -> Span:
        """Return the tokens from ``start`` to ``stop``, exclusive: of one record batch a view, else a copy."""
        spans: list[Span] = []
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[number])
            base = end - self._shards[number].num_tokens
            spans += self._shards[number].read(start - base, min(stop, end) - base)
            start, number = end, number + 1
        return _joined(spans)

    def rows(self) -> Iterator[Rows]:
        """Yield the documents in order, many at a time."""
        for shard in self._shards:
            yield from shard.rows()


class JoinedTokens:
    """The tokens of several readers, one after the other.

    Args:
        readers: At least one.
    """

    def __init__(self, readers: Sequence[TokenReader]) -> None:
        self._readers = readers
        self._ends = np.cumsum([reader.num_tokens for reader in readers], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self._ends[-1])

    @property
    def num_rows(self) -> int:
        """Encoded documents."""
        return sum(reader.num_rows for reader in self._readers)

    def read(self, start: int, stop: int) -> Span:
        """Return the tokens from ``start`` to ``stop``, exclusive."""
        (span,) = self.read_many([(start, stop)])
        return span

    def read_many(self, bounds: Sequence[tuple[int, int]]) -> list[Span]:
        """Return the tokens of several bounds; each reader receives all of its own at once."""
        parts = [(place, *part) for place, bound in enumerate(bounds) for part in self._parts(*bound)]
        found: list[list[Span]] = [[] for _ in bounds]
        for number, reader in enumerate(self._readers):
            own = [(place, start, stop) for place, owner, start, stop in parts if owner == number]
            spans = reader.read_many([(start, stop) for _, start, stop in own])
            for (place, _, _), span in zip(own, spans, strict=True):
                found[place].append(span)
        return [_joined(spans) for spans in found]

    def marks(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return whether each token from ``start`` to ``stop``, exclusive, is trained on."""
        parts = [self._readers[number].marks(first, last) for number, first, last in self._parts(start, stop)]
        return np.concatenate([np.zeros(0, np.bool_), *parts])

    def rows(self) -> Iterator[Rows]:
        """Yield the documents in order, many at a time."""
        for reader in self._readers:
            yield from reader.rows()

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the number of each reader that has some of the tokens, and their bounds in it."""
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[number])
            base = end - self._readers[number].num_tokens
            yield number, start - base, min(stop, end) - base
            start, number = end, number + 1


def _joined(spans: Sequence[Span]) -> Span:
    """Return consecutive spans as one."""
    if len(spans) == 1:
        return spans[0]
    weighted = any(span.weights is not None for span in spans)
    return Span(
        np.concatenate([np.zeros(0, np.int32), *(span.tokens for span in spans)]),
        np.concatenate([np.zeros(0, np.bool_), *(span.trained for span in spans)]),
        np.concatenate([_weights(span) for span in spans]) if weighted else None,
    )


def _weights(span: Span) -> NDArray[np.float32]:
    return span.trained.astype(np.float32) if span.weights is None else span.weights


class _Shard:
    """The mapped files of one shard."""

    def __init__(self, folder: Path, number: int, has_weights: bool) -> None:
        self.has_weights = has_weights
        self._tokens = _open(folder / layout.token_file(number), 3 if has_weights else 2)
        self._rows = _open(folder / layout.document_file(number), 3)
        batches = [self._tokens.get_batch(i) for i in range(self._tokens.num_record_batches)]
        self._columns = [_columns_of(batch) for batch in batches]
        self.num_tokens = sum(batch.num_rows for batch in batches)
        self._row_batches = [self._rows.get_batch(i) for i in range(self._rows.num_record_batches)]
        self.num_rows = sum(batch.num_rows for batch in self._row_batches)

    def read(self, start: int, stop: int) -> Iterator[Span]:
        while start < stop:
            number, place = divmod(start, layout.BATCH_TOKENS)
            end = min(layout.BATCH_TOKENS, place + stop - start)
            tokens, bits, weights = self._columns[number]
            first = place // 8
            marks = np.unpackbits(bits[first : -(-end // 8)], bitorder="little")[place - 8 * first : end - 8 * first]
            yield Span(tokens[place:end], marks.view(np.bool_), None if weights is None else weights[place:end])
            start += end - place

    def rows(self) -> Iterator[Rows]:
        for batch in self._row_batches:
            kinds = (np.int64, np.uint64, np.int32)
            yield Rows(*(_view(column, kind) for column, kind in zip(batch.columns, kinds, strict=True)))


def _columns_of(batch: Any) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.float32] | None]:
    """Return views of the tokens, of the bits of their marks, and of their weights."""
    weights = _view(batch.column(2), np.float32) if batch.num_columns == 3 else None
    bits = np.frombuffer(batch.column(1).buffers()[1], dtype=np.uint8)
    return _view(batch.column(0), np.int32), bits, weights


def _view(column: Any, kind: Any) -> NDArray[Any]:
    """Return a view of a whole column. Its ``to_numpy`` imports pandas, if that is installed: a third of a second."""
    return np.frombuffer(column.buffers()[1], kind, len(column))


def _open(path: Path, num_columns: int) -> Any:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path} cannot be read: {first_line(error)}. Delete its folder and tokenize the data again."
        ) from None
    if len(reader.schema) != num_columns:
        raise InputError(f"{path} has {len(reader.schema)} columns, not {num_columns}. Tokenize the data again.")
    return reader
