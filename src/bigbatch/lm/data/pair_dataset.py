"""Samples of several sequences: pairs of answers, and queries with their passages. A sample is never cut apart.

rows of a store → `make_pairs` → PairDataset → `bigbatch.lm.data.pair_batches.collate_pairs` → micro-batch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bigbatch.errors import InputError
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.pair_encoding import PairEncoder, num_closing_tokens
from bigbatch.lm.data.pairs import Objective
from bigbatch.lm.data.token_store.encoding import batches, encode_batch
from bigbatch.lm.data.token_store.reader import MemoryTokens, TokenReader
from bigbatch.lm.data.token_store.writer import concatenated
from bigbatch.lm.data.tokenizer import AnyTokenizer
from bigbatch.lm.data.validation_split import HashSplit
from bigbatch.lm.text import SAMPLE_NOUNS, plural


@dataclass(frozen=True)
class PairCounts:
    """Counts of one side of the data.

    Attributes:
        samples: Pairs, or queries with their passages.
        sequences: Sequences of all of them.
        tokens: Tokens of these, after truncation.
        cut: Sequences cut to the maximum length.
        left_out: Samples left out because of their length.
    """

    samples: int
    sequences: int
    tokens: int
    cut: int
    left_out: int

    def describe(self, objective: Objective, max_length: int) -> str:
        """Return the counts as one line for the user."""
        noun = SAMPLE_NOUNS[objective]
        parts = [
            f"{plural(self.samples, noun)} of {plural(self.sequences, 'sequence')} with {plural(self.tokens, 'token')}"
        ]
        if self.cut:
            parts.append(f"{plural(self.cut, 'sequence')} cut to --max-length {max_length}")
        if self.left_out:
            why = "a prompt that fills" if objective == "dpo" else "a sequence longer than"
            parts.append(f"{plural(self.left_out, noun)} with {why} --max-length {max_length} left out")
        return "; ".join(parts)


@dataclass(frozen=True)
class Pairs:
    """The samples of one side, in the order of the documents.

    Attributes:
        starts: int64 ``[samples, parts]``, the first token of each sequence.
        stored: int64 ``[samples, parts]``, its tokens in the store; 0 for a part that a sample lacks.
        lengths: int64 ``[samples, parts]``, those of its tokens that are used.
        counts: Of them.
    """

    starts: NDArray[np.int64]
    stored: NDArray[np.int64]
    lengths: NDArray[np.int64]
    counts: PairCounts


def most_parts(readers: Sequence[TokenReader]) -> int:
    """Return the sequences of the sample that has the most."""
    found = [int(rows.parts.max(initial=0)) + 1 for reader in readers for rows in reader.rows()]
    return max(found, default=1)


def make_pairs(
    reader: TokenReader,
    *,
    objective: Objective,
    max_length: int,
    split: HashSplit,
    num_parts: int,
    first_token: int = 0,
) -> list[Pairs]:
    """Return the samples of both sides, for training and for validation.

        dpo         sequences are cut to their first max_length tokens; a pair whose prompt fills them is left out
        reward      pairs with a longer sequence are left out, because the score is read at the end
        embedding   sequences are cut, and keep the special tokens at their end

    Args:
        reader: Of the tokens, encoded by `PairEncoder`.
        objective: Decides about long sequences; the first two rules are those of TRL.
        max_length: Tokens of the longest sequence.
        split: Which documents are held out.
        num_parts: Sequences of the sample that has the most, from `most_parts`.
        first_token: Added to every start.
    """
    rows = list(reader.rows())
    counts = np.concatenate([np.zeros(0, np.int64), *(some.counts for some in rows)])
    keys = np.concatenate([np.zeros(0, np.uint64), *(some.keys for some in rows)])
    parts = np.concatenate([np.zeros(0, np.int32), *(some.parts for some in rows)])
    firsts = np.cumsum(counts) - counts
    begins = np.flatnonzero(parts == 0)
    numbers = np.diff(np.append(begins, len(parts)))
    exists = np.arange(num_parts) < numbers[:, None]
    places = np.minimum(begins[:, None] + np.arange(num_parts), max(0, len(parts) - 1))
    stored = np.where(exists, counts[places], 0)
    starts = np.where(exists, firsts[places], 0)
    is_kept: NDArray[np.bool_] = np.ones(len(begins), np.bool_)
    if objective == "reward":
        is_kept = np.asarray((stored <= max_length).all(axis=1))
    elif objective == "dpo":
        for sample in np.flatnonzero((stored > max_length).any(axis=1)):
            is_kept[sample] = all(
                reader.read(start, start + min(number, max_length)).trained.any()
                for start, number in zip(starts[sample].tolist(), stored[sample].tolist(), strict=True)
            )
    held_out = split.held_out(keys[begins])
    sides = []
    for side in (~held_out, held_out):
        chosen = side & is_kept
        lengths = np.minimum(stored[chosen], max_length)
        totals = PairCounts(
            samples=int(chosen.sum()),
            sequences=int((stored[chosen] > 0).sum()),
            tokens=int(lengths.sum()),
            cut=int((stored[chosen] > max_length).sum()),
            left_out=int((side & ~is_kept).sum()),
        )
        sides.append(Pairs(starts[chosen] + first_token, stored[chosen], lengths, totals))
    return sides


def joined_pairs(parts: Sequence[Pairs]) -> Pairs:
    """Return the samples of several sources as one."""
    starts, stored, lengths = (
        np.concatenate(found)
        for found in zip(*((part.starts, part.stored, part.lengths) for part in parts), strict=True)
    )
    totals = zip(*(astuple(part.counts) for part in parts), strict=True)
    return Pairs(starts, stored, lengths, PairCounts(*map(sum, totals)))


class PairDataset:
    """Samples of several sequences.

    Attributes:
        lengths: int64 ``[samples]``, the tokens of each sample in a micro-batch: its sequences, padded to the longest.
        longest_sequence: Tokens of the longest sequence.
        reference: Float ``[samples, parts]``, log-probabilities of the answers under the reference model of dpo; None
            until they are computed.
    """

    def __init__(self, reader: TokenReader, pairs: Pairs, objective: Objective, *, num_closing: int = 0) -> None:
        """Store where the samples are; ``num_closing`` special tokens at the end of a sequence survive a cut."""
        self._reader = reader
        self._pairs = pairs
        self._objective = objective
        self._num_closing = num_closing
        self.num_parts = pairs.lengths.shape[1]
        self._is_ragged = bool((pairs.stored == 0).any())
        self.lengths: NDArray[np.int64] = pairs.lengths.max(axis=1, initial=0) * self.num_parts
        self.longest_sequence = int(pairs.lengths.max(initial=0))
        self.reference: Tensor | None = None

    def __len__(self) -> int:
        return len(self._pairs.starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sample.

        Returns:
            ``sequences``: int64 ``[length]`` for each part, a single token 0 for one that the sample lacks; ``index``,
            int64 0-d. Of dpo, ``answers``: bool ``[length]`` for each, whether a token belongs to the answer; and
            ``reference``, ``[parts]``, zeros while it is unknown. With a number of parts that differs, ``present``,
            bool ``[parts]``.
        """
        if index >= len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        rows = (array[index].tolist() for array in (self._pairs.starts, self._pairs.stored, self._pairs.lengths))
        found = [self._read(*row) for row in zip(*rows, strict=True)]
        sample: dict[str, Any] = {"sequences": [tokens for tokens, _ in found], "index": torch.tensor(index)}
        if self._objective == "dpo":
            sample["answers"] = [answer for _, answer in found]
            zeros = torch.zeros(self.num_parts)
            sample["reference"] = zeros if self.reference is None else self.reference[index]
        if self._is_ragged:
            sample["present"] = torch.from_numpy(self._pairs.stored[index] > 0)
        return sample

    def take(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return several samples."""
        return [self[index] for index in indices]

    def _read(self, start: int, stored: int, length: int) -> tuple[Tensor, Tensor]:
        if not stored:
            return torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool)
        span = self._reader.read(start, start + stored)
        closing = min(self._num_closing, length) if length < stored else 0
        tokens = np.concatenate([span.tokens[: length - closing], span.tokens[stored - closing :]])
        return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(span.trained[:length].copy())

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, as `lengths` counts them."""
        return int(self.lengths.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest sample, as `lengths` counts them."""
        return int(self.lengths.max())


def encode_pairs(
    documents: Sequence[Document],
    tokenizer: AnyTokenizer,
    objective: Objective,
    *,
    max_length: int,
    broken: list[str] | None = None,
) -> tuple[PairDataset, PairCounts]:
    """Encode documents in memory.

    Args:
        documents: With parts.
        tokenizer: As for `PairEncoder`.
        objective: Decides about tokens and long sequences.
        max_length: Tokens of the longest sequence.
        broken: Receives the errors of documents that cannot be encoded, which are left out; None to raise the first.

    Raises:
        InputError: A document cannot be encoded, or none can.
    """
    encoder = PairEncoder(tokenizer, objective)
    blocks = [encode_batch(batch, encoder, skip_broken=broken is not None) for batch in batches(documents, encoder)]
    found = [reason for block in blocks for reason in block.broken]
    if broken is not None:
        broken += found
    if found and len(found) == len(documents):
        raise InputError(found[0])
    reader = MemoryTokens(concatenated(blocks))
    training, _ = make_pairs(
        reader, objective=objective, max_length=max_length, split=HashSplit(), num_parts=most_parts([reader])
    )
    return PairDataset(reader, training, objective, num_closing=num_closing_tokens(tokenizer)), training.counts
