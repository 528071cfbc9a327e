"""Validation split by a hash of the content: stable when documents are reordered or added."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigbatch.lm.data.documents import Document

SMALLEST_CUT_LINES = 20
"""Minimum number of lines of a single text for a validation split by lines."""


@dataclass(frozen=True)
class HashSplit:
    """The documents that are held out, by the first 64 bits of their keys: `split_documents` for any number of them.

    Attributes:
        fraction: Documents below it are held out, with keys mapped to [0, 1).
        also: A key that is held out too, because no document is below the fraction.
        never: A key that is not, because all documents are.
    """

    fraction: float = 0.0
    also: int | None = None
    never: int | None = None

    @classmethod
    def of(cls, keys: Iterable[NDArray[np.uint64]], *, validation_fraction: float) -> HashSplit:
        """Return the split of documents with these keys, many at a time; equal documents alone are for training.

        Raises:
            ValueError: ``validation_fraction`` is out of range.
        """
        _check_fraction(validation_fraction)
        if validation_fraction == 0:
            return cls()
        lowest, highest = 2**64, -1
        for some in keys:
            if len(some):
                lowest, highest = min(lowest, int(some.min())), max(highest, int(some.max()))
        if lowest >= highest:  # none, or copies of one document
            return cls()
        if not _positions(np.uint64(lowest)) < validation_fraction:
            return cls(validation_fraction, also=lowest)
        if _positions(np.uint64(highest)) < validation_fraction:
            return cls(validation_fraction, never=highest)
        return cls(validation_fraction)

    def held_out(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return whether each document is held out."""
        found: NDArray[np.bool_] = _positions(keys) < self.fraction
        if self.also is not None:
            found |= keys == np.uint64(self.also)
        if self.never is not None:
            found &= keys != np.uint64(self.never)
        return found


def _positions(keys: Any) -> Any:
    return keys.astype(np.float64) / 2.0**64


def split_documents(
    documents: Sequence[Document], *, validation_fraction: float
) -> tuple[list[Document], list[Document]]:
    """Split documents into (training, validation), each in the given order.

        held out  ⇔  first 64 bits of the SHA-256 of the content < validation_fraction × 2^64

    so equal documents are always on the same side, and a document stays on its side when others are added or removed.
    If one side would be empty, the document closest to the threshold moves to it, with its duplicates. Of a single
    text with at least ``SMALLEST_CUT_LINES`` lines the last lines are held out; any other single document is for
    training.

    Args:
        documents: Any number of documents, including none.
        validation_fraction: At least 0, which holds nothing out, and below 1.

    Raises:
        ValueError: ``validation_fraction`` is out of range.
    """
    _check_fraction(validation_fraction)
    keys = {document.key for document in documents}
    if validation_fraction == 0 or not keys:
        return list(documents), []
    if len(keys) == 1:
        return cut_single(documents, validation_fraction)
    held_out = {key for key in keys if _position(key) < validation_fraction}
    if not held_out:
        held_out = {min(keys)}
    elif held_out == keys:
        held_out = keys - {max(keys)}
    training = [document for document in documents if document.key not in held_out]
    return training, [document for document in documents if document.key in held_out]


def _check_fraction(validation_fraction: float) -> None:
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            f"validation_fraction={validation_fraction} must be at least 0 and below 1: it is a share of the "
            "documents, and training needs some of them."
        )


def _position(key: str) -> float:
    """Map the first 64 bits of a key to [0, 1)."""
    return int(key[:16], 16) / 2**64


def cut_single(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Hold out the last lines of the only document, if it is a text that is long enough."""
    training = list(documents)
    text = training[0].text
    # Split at \n only, so that the line number in the source matches an editor's.
    lines = StringIO(text, newline="\n").readlines() if text is not None else []
    if len(training) > 1 or len(lines) < SMALLEST_CUT_LINES:
        return training, []
    num_training = min(len(lines) - 1, max(1, len(lines) - round(len(lines) * fraction)))
    first = Document(training[0].source, text="".join(lines[:num_training]))
    last = Document(f"{training[0].source}:{num_training + 1}", text="".join(lines[num_training:]))
    if first.key == last.key or not (first.text or "").strip() or not (last.text or "").strip():
        return training, []
    return [first], [last]
