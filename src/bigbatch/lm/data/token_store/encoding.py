"""Encode documents as blocks of arrays, batch by batch; long texts in pieces that are tokenized as the whole would be.

documents → batches (documents, or a piece of a long text) → encode_batch → Block
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from bigbatch.lm.data.documents import Document, text_key
from bigbatch.lm.data.pair_encoding import PairEncoder
from bigbatch.lm.data.token_records import all_but_first
from bigbatch.lm.data.token_store.text_cuts import TextCutter
from bigbatch.lm.data.token_store.writer import Block
from bigbatch.lm.data.tokenization import BATCH_DOCUMENTS, DocumentEncoder, Encoded

BATCH_CHARACTERS = 2**16
"""Characters that are encoded together: while they are, each needs about 80 bytes, on every core."""
LONG_TEXT = 2 * BATCH_CHARACTERS
"""Characters of a text that is tokenized in pieces of about ``BATCH_CHARACTERS``."""


@dataclass(frozen=True)
class DocumentBatch:
    """Documents that are encoded together."""

    documents: list[Document]

    @property
    def characters(self) -> int:
        """Sizes of all documents."""
        return sum(document.size for document in self.documents)


@dataclass(frozen=True)
class TextPiece:
    """A piece of a long text.

    Attributes:
        text: Of the piece.
        source: Origin of the whole text.
        key: Hash of the whole text, in hex.
        is_first: Whether the text starts with it.
        is_last: Whether the text ends with it.
    """

    text: str
    source: str
    key: str
    is_first: bool
    is_last: bool

    @property
    def characters(self) -> int:
        """Characters of the piece."""
        return len(self.text)


@dataclass(frozen=True)
class TextBatch:
    """Texts that are encoded together: documents without anything else."""

    texts: list[str]

    @property
    def characters(self) -> int:
        """Characters of all texts."""
        return sum(map(len, self.texts))


Batch = DocumentBatch | TextBatch | TextPiece
Encoder = DocumentEncoder | PairEncoder


def batches(documents: Iterable[Document], encoder: Encoder) -> Iterator[Batch]:
    """Group documents, in order, into batches of at least ``BATCH_CHARACTERS``, or cut them into pieces."""
    cutter = TextCutter(encoder)
    batch: list[Document] = []
    characters = 0
    for document in documents:
        text = document.text
        length = document.size if text is None else len(text)
        if text is not None and length > LONG_TEXT:
            if batch:
                yield _batch(batch)
            batch, characters = [], 0
            yield from _pieces(document, text, cutter)
            continue
        batch.append(document)
        characters += length
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield _batch(batch)
            batch, characters = [], 0
    if batch:
        yield _batch(batch)


def _batch(documents: list[Document]) -> DocumentBatch | TextBatch:
    texts = [document.text for document in documents if document.text is not None]
    return TextBatch(texts) if len(texts) == len(documents) else DocumentBatch(documents)


def encode_batch(batch: Batch, encoder: Encoder, *, skip_broken: bool) -> Block:
    """Encode a batch as one block.

    Args:
        batch: Of documents, or a piece of a text.
        encoder: With the tokenizer.
        skip_broken: Whether documents that cannot be encoded are left out, and named in the block.

    Raises:
        InputError: A document yields no training token, or the tokenizer cannot encode it; the message has its source.
    """
    if isinstance(batch, TextPiece):
        encoded = encoder.text_piece(batch.text, is_first=batch.is_first, is_last=batch.is_last)
        return _block([encoded], [batch.key], [0], continues=not batch.is_first)
    if isinstance(batch, TextBatch):
        return _text_block(batch.texts, encoder)
    broken: list[str] | None = [] if skip_broken else None
    if all(document.tokens is not None for document in batch.documents):
        return _token_block([document for document in batch.documents if encoder.accepts(document, broken)], broken)
    found = list(encoder.encode(batch.documents, broken))
    parts: list[int] = []
    last = -1
    for part in found:
        parts.append(parts[-1] + 1 if part.document == last else 0)
        last = part.document
    return _block(found, [batch.documents[part.document].key for part in found], parts, broken=tuple(broken or ()))


def _text_block(texts: list[str], encoder: Encoder) -> Block:
    """Encode texts: the same block as that of their `Encoded`, without one for each."""
    prefix, rows, end = encoder.texts(texts)
    counts = np.fromiter(map(len, rows), np.int64, len(rows)) + len(prefix) + 1
    ends = np.cumsum(counts)
    tokens = np.empty(int(ends[-1]), np.int32)
    is_inside = np.ones(len(tokens), np.bool_)
    for place, token in enumerate(prefix):
        tokens[ends - counts + place] = token
        is_inside[ends - counts + place] = False
    tokens[ends - 1] = end
    is_inside[ends - 1] = False
    tokens[is_inside] = np.fromiter(chain.from_iterable(rows), np.int32, int(is_inside.sum()))
    trained = np.ones(len(tokens), np.bool_)
    trained[ends - counts] = False
    keys = np.fromiter(map(text_key, texts), np.uint64, len(texts))
    return Block(tokens, trained, None, counts, keys, np.zeros(len(texts), np.int32))


def _token_block(documents: list[Document], broken: list[str] | None) -> Block:
    """Return the tokens of documents that are encoded already, all of them accepted by the encoder."""
    tokens = np.frombuffer(b"".join(document.tokens or b"" for document in documents), "<i4")
    trained = b"".join(document.trained or all_but_first(document) for document in documents)
    return Block(
        tokens.astype(np.int32, copy=False),
        np.frombuffer(trained, np.bool_),
        None,
        np.fromiter((document.size // 4 for document in documents), np.int64, len(documents)),
        np.fromiter((int(document.key[:16], 16) for document in documents), np.uint64, len(documents)),
        np.zeros(len(documents), np.int32),
        broken=tuple(broken or ()),
    )


def _block(
    encoded: list[Encoded],
    keys: list[str],
    parts: list[int],
    *,
    continues: bool = False,
    broken: tuple[str, ...] = (),
) -> Block:
    flat = array("i")
    for part in encoded:
        flat.extend(part.tokens)
    trained = b"".join(part.trained for part in encoded)
    return Block(
        np.frombuffer(flat, np.int32) if flat else np.zeros(0, np.int32),
        np.frombuffer(trained, np.bool_),
        _weights(encoded),
        np.fromiter((len(part.tokens) for part in encoded), np.int64, len(encoded)),
        np.fromiter((int(key[:16], 16) for key in keys), np.uint64, len(keys)),
        np.array(parts, np.int32),
        continues,
        broken,
    )


def _weights(encoded: list[Encoded]) -> NDArray[np.float32] | None:
    """Return the weights of all tokens; None if no document has weights other than 0 and 1."""
    if all(part.weights is None for part in encoded):
        return None
    marks = [np.frombuffer(part.trained, np.bool_) if part.weights is None else part.weights for part in encoded]
    return np.concatenate([np.asarray(mark, np.float32) for mark in marks])


def _pieces(document: Document, text: str, cutter: TextCutter) -> Iterator[TextPiece]:
    """Cut a text between words where the tokens on both sides do not depend on each other."""
    cuts = [0, *cutter.cuts(text, every=BATCH_CHARACTERS), len(text)]
    for start, stop in pairwise(cuts):
        yield TextPiece(text[start:stop], document.source, document.key, start == 0, stop == len(text))
