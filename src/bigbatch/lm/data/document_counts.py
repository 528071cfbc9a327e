"""Reads documents without keeping them: how many, how long, for training or not; and some of them.

documents, read once → keys and lengths → split → documents for training, read again
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from bigbatch.errors import InputError
from bigbatch.lm.data.corpus import Corpus
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.validation_split import HashSplit, cut_single


@dataclass(frozen=True)
class DocumentCounts:
    """What one pass over documents found.

    Attributes:
        characters: Of each; of tokens, 4 for each.
        for_training: Whether each is for training; the documents are then those of `documents`.
        cut: The two parts of the only document, if it is a text that was cut for validation.
    """

    characters: NDArray[np.int64]
    for_training: NDArray[np.bool_]
    cut: tuple[Document, ...] = ()

    def documents(self, corpora: Iterable[Corpus]) -> Iterable[Document]:
        """Return the documents that were counted, read again."""
        return self.cut or chain.from_iterable(corpora)


def count_documents(corpora: Iterable[Corpus], fraction: float) -> DocumentCounts:
    """Read documents once and split them.

    Raises:
        InputError: A document cannot be read.
    """
    keys, characters = array("Q"), array("q")
    first: Document | None = None
    for document in chain.from_iterable(corpora):
        first = first or document
        keys.append(int(document.key[:16], 16))
        characters.append(document.size)
    if len(keys) == 1 and first is not None and fraction:
        training, held_out = cut_single([first], fraction)
        parts = (*training, *held_out)
        lengths = [sum(map(len, part.texts)) for part in parts]
        return DocumentCounts(np.array(lengths, np.int64), np.arange(len(parts)) < len(training), parts)
    held_out_keys = np.array(keys, np.uint64)
    split = HashSplit.of([held_out_keys], validation_fraction=fraction)
    return DocumentCounts(np.array(characters, np.int64), ~split.held_out(held_out_keys))


def training_texts(corpora: Sequence[Corpus], fraction: float) -> tuple[Iterator[str], int]:
    """Return the texts of the documents for training, read one by one, and their characters.

    Raises:
        InputError: A document cannot be read.
    """
    for corpus in corpora:
        texts_of(next(iter(corpus)))
    counts = count_documents(corpora, fraction)
    total = int(counts.characters[counts.for_training].sum())
    return _texts(counts.documents(corpora), counts.for_training), total


def _texts(documents: Iterable[Document], chosen: Iterable[bool]) -> Iterator[str]:
    for document, is_chosen in zip(documents, chosen, strict=True):
        if is_chosen:
            yield from texts_of(document)


def texts_of(document: Document) -> tuple[str, ...]:
    """Return the texts of a document, to train a tokenizer on.

    Raises:
        InputError: It has tokens.
    """
    if document.tokens is not None:
        raise InputError(
            f"{document.source} has tokens and no text, and --model tiny trains a tokenizer on text. Pass the --model "
            "whose tokenizer made the tokens."
        )
    return document.texts


def sample_documents(corpora: Sequence[Corpus], fraction: float, most: int) -> tuple[list[Document], int]:
    """Return at most ``most`` of the documents for training, evenly spaced, the longest included, and their number.

    Raises:
        InputError: A document cannot be read.
    """
    counts = count_documents(corpora, fraction)
    chosen = np.flatnonzero(counts.for_training)
    places = np.arange(len(chosen))
    if len(chosen) > most:
        places = np.arange(most) * len(chosen) // most
        longest = int(counts.characters[chosen].argmax())
        if longest not in places:
            places[longest * most // len(chosen)] = longest
    return _chosen(counts.documents(corpora), chosen[places]), len(chosen)


def _chosen(documents: Iterable[Document], places: NDArray[np.int64]) -> list[Document]:
    wanted = set(places.tolist())
    return [document for i, document in enumerate(documents) if i in wanted]
