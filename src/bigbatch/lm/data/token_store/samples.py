"""The samples of encoded documents: pieces of at most ``max_length`` tokens, for training or for validation.

rows of a store, max_length, side of the split → start, length and labels of each sample, in files that are mapped

A folder of samples has manifest.json and, for each side, three files of little-endian numbers, one for each sample:
``SIDE.start`` (int64: its first token in the stores), ``SIDE.length`` (int32: its tokens) and ``SIDE.labels`` (int32:
how many of its labels are trained on). SIDE is ``training`` or ``validation``.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bigbatch.errors import InputError
from bigbatch.lm.data.token_store.reader import Rows, TokenReader
from bigbatch.lm.data.validation_split import HashSplit
from bigbatch.lm.files import read_json, write_atomically
from bigbatch.lm.text import plural

MANIFEST = "manifest.json"
SIDES = ("training", "validation")
_COLUMNS: dict[str, np.dtype[Any]] = {"start": np.dtype("<i8"), "length": np.dtype("<i4"), "labels": np.dtype("<i4")}
_CHUNK_TOKENS = 1 << 22  # tokens whose marks are in memory at a time


@dataclass(frozen=True)
class Counts:
    """Counts of encoded documents, samples and tokens.

    Attributes:
        documents: Documents encoded.
        samples: Samples, each a document or a piece of one.
        cut_documents: Documents cut into more than one piece.
        tokens: Tokens of all documents, special ones included.
        label_tokens: Tokens that are trained on, each once per epoch.
        masked_pieces_left_out: Pieces of long documents without a token to train on.
        turn_by_turn: Conversations encoded once for each turn of the assistant, or for some of them, because the chat
            template renders earlier turns in another way; their earlier turns are in ``tokens`` several times.
        broken: Documents left out because they cannot be encoded.
    """

    documents: int = 0
    samples: int = 0
    cut_documents: int = 0
    tokens: int = 0
    label_tokens: int = 0
    masked_pieces_left_out: int = 0
    turn_by_turn: int = 0
    broken: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        """Return the counts of both."""
        return Counts(*(one + two for one, two in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def describe(self) -> str:
        """Return the counts as one line for the user."""
        parts = [
            f"{plural(self.documents, 'document')} with {plural(self.tokens, 'token')}, "
            f"{self.label_tokens:,} of them trained on",
            f"{plural(self.samples, 'sequence')}",
        ]
        if self.cut_documents:
            parts.append(f"{plural(self.cut_documents, 'long document')} cut into pieces")
        if self.masked_pieces_left_out:
            parts.append(f"{plural(self.masked_pieces_left_out, 'piece')} without training tokens left out")
        if self.turn_by_turn:
            parts.append(
                f"{plural(self.turn_by_turn, 'conversation')} trained turn by turn, because the chat template renders "
                "earlier turns in another way"
            )
        if self.broken:
            parts.append(f"{plural(self.broken, 'document')} that cannot be encoded left out")
        return "; ".join(parts)


@dataclass(frozen=True)
class Samples:
    """The samples of one side, in the order of the documents.

    Attributes:
        starts: int64 ``[samples]``, the first token of each.
        lengths: int32 ``[samples]``, tokens of each, without its last label.
        label_counts: int32 ``[samples]``, labels of each that are trained on, at least 1.
        counts: Of the documents behind them.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    label_counts: NDArray[np.int32]
    counts: Counts


def make_samples(reader: TokenReader, *, max_length: int, split: HashSplit, first_token: int = 0) -> list[Samples]:
    """Return the samples of both sides, in memory.

    Args:
        reader: Of the tokens.
        max_length: Tokens of the longest sample.
        split: Which documents are held out.
        first_token: Added to every start.
    """
    parts: list[list[Samples]] = [[], []]
    for side, found in _parts(reader, max_length, split, first_token):
        parts[side].append(found)
    return [_joined(found) for found in parts]


def write_samples(
    folder: Path, readers: Sequence[TokenReader], *, max_length: int, split: HashSplit, facts: dict[str, Any]
) -> None:
    """Write the samples of both sides of stores into an empty folder, and sync it.

    Args:
        folder: Receives the files.
        readers: Of the tokens of each source; a start counts the tokens of the sources before it.
        max_length: Tokens of the longest sample.
        split: Which documents are held out.
        facts: Stored in the manifest.

    Raises:
        OSError: A file cannot be written.
    """
    totals = [Counts(), Counts()]
    by_source: list[list[int]] = []
    with ExitStack() as stack:
        files = [[stack.enter_context((folder / f"{side}.{name}").open("wb")) for name in _COLUMNS] for side in SIDES]
        first_token = 0
        for reader in readers:
            own = [Counts(), Counts()]
            for side, found in _parts(reader, max_length, split, first_token):
                own[side] += found.counts
                _write_columns(files[side], found)
            by_source.append([counts.samples for counts in own])
            totals = [total + counts for total, counts in zip(totals, own, strict=True)]
            first_token += reader.num_tokens
        for file in (file for side in files for file in side):
            file.flush()
            os.fsync(file.fileno())
    content = {"counts": [asdict(counts) for counts in totals], "by_source": by_source, **facts}
    write_atomically(folder / MANIFEST, json.dumps(content).encode())


def read_samples(folder: Path) -> tuple[list[Samples], list[list[int]]]:
    """Map the samples of both sides; return them, and for each source the number of samples on each side.

    Raises:
        InputError: The folder is damaged.
    """
    try:
        content = read_json(folder / MANIFEST)
        sides = []
        for side, counts in zip(SIDES, content["counts"], strict=True):
            starts, lengths, labels = (
                _mapped(folder / f"{side}.{name}", dtype, counts["samples"]) for name, dtype in _COLUMNS.items()
            )
            sides.append(Samples(starts, lengths, labels, Counts(**counts)))
        return sides, content["by_source"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"the samples in {folder} are damaged ({error}). Delete the folder.") from error


def _mapped(path: Path, dtype: np.dtype[Any], number: int) -> NDArray[Any]:
    if path.stat().st_size != number * dtype.itemsize:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes, not {number * dtype.itemsize:,}")
    if not number:
        return np.zeros(0, dtype)
    # A plain array over the map: indexing np.memmap itself is several times slower.
    return np.asarray(np.memmap(path, dtype, mode="r"))


def _write_columns(files: Sequence[BinaryIO], found: Samples) -> None:
    arrays: tuple[NDArray[Any], ...] = found.starts, found.lengths, found.label_counts
    for file, array, dtype in zip(files, arrays, _COLUMNS.values(), strict=True):
        file.write(array.astype(dtype, copy=False).tobytes())


def _parts(reader: TokenReader, max_length: int, split: HashSplit, first_token: int) -> Iterator[tuple[int, Samples]]:
    """Yield (side, samples of many documents), the documents in order."""
    done = 0
    for rows in chain.from_iterable(map(_few_tokens, reader.rows())):
        held_out = split.held_out(rows.keys)
        starts = done + np.cumsum(rows.counts) - rows.counts
        for side, chosen in ((0, ~held_out), (1, held_out)):
            if chosen.any():
                found, _ = cut(reader, starts[chosen], rows[chosen], max_length)
                yield side, _moved(found, first_token)
        done += int(rows.counts.sum())


def _few_tokens(rows: Rows) -> Iterator[Rows]:
    """Divide documents after about ``_CHUNK_TOKENS`` tokens, not within one: long documents have many samples."""
    chunks = np.cumsum(rows.counts) // _CHUNK_TOKENS
    starts = np.flatnonzero((np.diff(chunks, prepend=0) > 0) & (rows.parts == 0))
    for start, stop in pairwise([0, *starts.tolist(), len(chunks)]):
        if start < stop:
            yield Rows(rows.counts[start:stop], rows.keys[start:stop], rows.parts[start:stop])


def cut(
    reader: TokenReader, starts: NDArray[np.int64], rows: Rows, max_length: int
) -> tuple[Samples, NDArray[np.int64]]:
    """Cut documents into pieces of ``max_length`` inputs, the last one shorter; the last token is only a label.

    Returns:
        The pieces with a label to train on, and for each the place of its document in ``rows``.
    """
    inputs = rows.counts - 1
    pieces = -(-inputs // max_length)
    documents = np.repeat(np.arange(len(inputs)), pieces)
    places = (np.arange(len(documents)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * max_length
    first = starts[documents] + places
    lengths = np.minimum(max_length, inputs[documents] - places)
    labels = _label_counts(reader, first, lengths)
    usable = labels > 0
    totals = Counts(
        documents=int((rows.parts == 0).sum()),
        samples=int(usable.sum()),
        cut_documents=len(np.unique(np.cumsum(rows.parts == 0)[pieces > 1])),
        tokens=int(rows.counts.sum()),
        label_tokens=int(labels.sum()),
        masked_pieces_left_out=int((~usable).sum()),
        turn_by_turn=int((rows.parts == 1).sum()),
    )
    found = Samples(first[usable], lengths[usable].astype(np.int32), labels[usable].astype(np.int32), totals)
    return found, documents[usable]


def _label_counts(reader: TokenReader, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the trained tokens among the labels ``start + 1 … start + length`` of each piece; starts increase."""
    found = np.zeros(len(starts), np.int64)
    place = 0
    while place < len(starts):
        end = max(place + 1, int(np.searchsorted(starts, starts[place] + _CHUNK_TOKENS)))
        low, high = int(starts[place]), int(starts[end - 1] + lengths[end - 1] + 1)
        up_to = np.cumsum(reader.marks(low, high), dtype=np.int64)  # inclusive
        first = starts[place:end] - low
        found[place:end] = up_to[first + lengths[place:end]] - up_to[first]
        place = end
    return found


def _moved(samples: Samples, by: int) -> Samples:
    return Samples(samples.starts + by, samples.lengths, samples.label_counts, samples.counts)


def _joined(parts: Sequence[Samples]) -> Samples:
    counts = sum((part.counts for part in parts), Counts())
    return Samples(
        np.concatenate([np.zeros(0, np.int64), *(part.starts for part in parts)]),
        np.concatenate([np.zeros(0, np.int32), *(part.lengths for part in parts)]),
        np.concatenate([np.zeros(0, np.int32), *(part.label_counts for part in parts)]),
        counts,
    )
