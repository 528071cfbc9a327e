"""Read the tokens of shards where they are: each record from its bytes, when a sample of it is used."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bigbatch.errors import InputError
from bigbatch.lm.data.token_records import all_but_first, to_token_document, token_ids
from bigbatch.lm.data.token_shards.index import Index
from bigbatch.lm.data.token_shards.shards import TokenShards
from bigbatch.lm.data.token_store.reader import Rows, Span

_ROWS = 1 << 16  # records at a time
_KEPT = 64  # decoded records in memory: a long one is cut into several samples
_REQUESTS = 16  # at the same time, to a remote storage


class ShardTokens:
    """The tokens of indexed shards, as a `bigbatch.lm.data.token_store.reader.TokenReader`.

    Args:
        shards: The shards.
        index: Of them.
    """

    def __init__(self, shards: TokenShards, index: Index) -> None:
        self._shards = shards
        self._index = index
        self._last_rows = np.cumsum(index.manifest.rows, dtype=np.int64)
        self._record = lru_cache(_KEPT)(self._read_record)

    @property
    def num_tokens(self) -> int:
        """Tokens of all records."""
        return self._index.manifest.tokens

    @property
    def num_rows(self) -> int:
        """Records."""
        return self._index.manifest.documents

    def read(self, start: int, stop: int) -> Span:
        """Return the tokens from ``start`` to ``stop``, exclusive.

        Raises:
            InputError: A record cannot be read, or changed since it was indexed.
        """
        tokens, trained = [np.zeros(0, np.int32)], [np.zeros(0, np.bool_)]
        row = int(np.searchsorted(self._index.ends, start, side="right"))
        while start < stop:
            end = int(self._index.ends[row])
            record_tokens, record_trained = self._record(row)
            first = start - (end - len(record_tokens))
            part = slice(first, first + min(stop, end) - start)
            tokens.append(record_tokens[part])
            trained.append(record_trained[part])
            start, row = end, row + 1
        if len(tokens) == 2:
            return Span(tokens[1], trained[1], None)
        return Span(np.concatenate(tokens), np.concatenate(trained), None)

    def read_many(self, bounds: Sequence[tuple[int, int]]) -> list[Span]:
        """Return the tokens of several bounds; those of a remote storage are requested at the same time."""
        if self._shards.storage.is_local or len(bounds) < 2:
            return [self.read(start, stop) for start, stop in bounds]
        with ThreadPoolExecutor(min(_REQUESTS, len(bounds)), thread_name_prefix="shards") as threads:
            return list(threads.map(lambda bound: self.read(*bound), bounds))

    def marks(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return whether each token from ``start`` to ``stop`` is trained on; from the index, without the shards."""
        if (bits := self._index.marks) is not None:
            first = start // 8
            found = np.unpackbits(bits[first : -(-stop // 8)], bitorder="little")
            return found[start - 8 * first : stop - 8 * first].view(np.bool_)
        marks = np.ones(stop - start, np.bool_)
        ends = self._index.ends
        rows = slice(*np.searchsorted(ends, (start, stop), side="left").tolist())
        firsts = ends[rows]
        marks[firsts[firsts < stop] - start] = False
        if start == 0 < stop:
            marks[0] = False
        return marks

    def rows(self) -> Iterator[Rows]:
        """Yield the records in order, many at a time."""
        before = 0
        for first in range(0, self.num_rows, _ROWS):
            ends = self._index.ends[first : first + _ROWS]
            counts = np.diff(ends, prepend=before)
            yield Rows(counts, self._index.keys[first : first + _ROWS], np.zeros(len(ends), np.int32))
            before = int(ends[-1])

    def _read_record(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        index, shards = self._index, self._shards
        number = int(np.searchsorted(self._last_rows, row, side="right"))
        file, offset = shards.shards[number], int(index.offsets[row])
        source = f"{shards.name}: record {row + 1:,}"
        data = shards.storage.read(file.path, offset, offset + int(index.sizes[row]))
        try:
            document = to_token_document(shards.decode(number, data, source), source)
        except InputError:
            document = None
        if document is None or int(document.key[:16], 16) != int(index.keys[row]):
            raise InputError(
                f"{source} is not what it was when the shards were indexed: {shards.storage.name_of(file.path)} was "
                "changed. Restore it, or start a new run."
            )
        trained = np.frombuffer(document.trained or all_but_first(document), np.bool_)
        return token_ids(document).astype(np.int32, copy=False), trained
