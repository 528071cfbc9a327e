"""The fingerprint of the data in runs of earlier versions, which held all tokens and samples in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bigbatch.lm.data.token_store.reader import Rows, Span, TokenReader
from bigbatch.lm.data.token_store.samples import cut
from bigbatch.lm.data.validation_split import HashSplit

_CHUNK = 1 << 22  # tokens in memory at a time


def legacy_fingerprint(readers: Sequence[TokenReader], *, max_length: int, split: HashSplit) -> str:
    """Return the SHA-256, in hex, of tokens for training, their marks, and (start, length, document) of the samples.

    Reads the tokens three times. Starts and documents are counted among those for training.
    """
    digest = hashlib.sha256()
    for span in _spans(readers, split):
        digest.update(span.tokens.astype("<i4", copy=False).tobytes())
    for span in _spans(readers, split):
        digest.update(span.trained.tobytes())
    tokens = documents = 0
    for reader, starts, rows in _training(readers, split):
        samples, owners = cut(reader, starts, rows, max_length)
        before = tokens + np.cumsum(rows.counts) - rows.counts  # tokens of the documents for training before each
        first = before[owners] + samples.starts - starts[owners]
        triples = np.stack([first, samples.lengths.astype(np.int64), documents + owners], axis=1)
        digest.update(triples.astype("<i8", copy=False).tobytes())
        tokens += int(rows.counts.sum())
        documents += len(rows.counts)
    return digest.hexdigest()


def _training(
    readers: Sequence[TokenReader], split: HashSplit
) -> Iterator[tuple[TokenReader, NDArray[np.int64], Rows]]:
    """Yield the documents for training with their first tokens, many at a time."""
    for reader in readers:
        done = 0
        for rows in reader.rows():
            chosen = ~split.held_out(rows.keys)
            starts = done + np.cumsum(rows.counts) - rows.counts
            yield reader, starts[chosen], rows[chosen]
            done += int(rows.counts.sum())


def _spans(readers: Sequence[TokenReader], split: HashSplit) -> Iterator[Span]:
    for reader, starts, rows in _training(readers, split):
        ends = starts + rows.counts
        breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
        for first, last in pairwise([0, *breaks.tolist(), len(starts)]):
            if first == last:
                continue
            for start in range(int(starts[first]), int(ends[last - 1]), _CHUNK):
                yield reader.read(start, min(start + _CHUNK, int(ends[last - 1])))
