"""Tokenized samples of documents: every trained token is the label of exactly one position of one sample.

documents → encoded → TokenReader → samples → TokenDataset → collate → micro-batch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bigbatch.errors import InputError
from bigbatch.lm.data.conversations import TrainOn
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.token_store.encoding import batches, encode_batch
from bigbatch.lm.data.token_store.reader import MemoryTokens, Span, TokenReader
from bigbatch.lm.data.token_store.samples import Counts, Samples, make_samples
from bigbatch.lm.data.token_store.writer import concatenated
from bigbatch.lm.data.tokenization import DocumentEncoder
from bigbatch.lm.data.tokenizer import AnyTokenizer
from bigbatch.lm.data.validation_split import HashSplit, split_documents

__all__ = ["IGNORED", "Counts", "TokenDataset", "collate", "encode", "split_documents", "weights_of"]

IGNORED = -100
"""Label of a position whose next token is not trained on: torch's default ``ignore_index``."""
MOST_COUNTED = 2048  # samples whose tokens are counted
_CHUNK = 256  # samples whose tokens are in memory at a time


class TokenDataset:
    """Samples of one sequence of tokens; a sample is a piece of one document.

        input_ids[j] = tokens[start + j]
        labels[j]    = tokens[start + j + 1] if it is trained on, else -100            0 ≤ j < length

    The last label of a piece is the first input of the document's next piece. Labels are already shifted: the target
    of the logits at position j is ``labels[j]``. Nothing here is as long as the data: tokens and samples may be mapped
    from files.

    Attributes:
        lengths: int32 ``[samples]``, tokens of each sample, without padding.
        label_counts: int32 ``[samples]``, labels of each sample, at least 1.
    """

    def __init__(self, reader: TokenReader, samples: Samples) -> None:
        self._reader = reader
        self._starts = samples.starts
        self.lengths: NDArray[np.int32] = samples.lengths
        self.label_counts: NDArray[np.int32] = samples.label_counts

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``labels``, int64 ``[length]``, of one sample.

        With ``weights``, float32 ``[length]``, if tokens have weights other than 0 and 1.
        """
        if index >= len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.take([index])[0]

    def take(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return several samples; those of a remote storage are requested at the same time."""
        starts = [int(self._starts[index]) for index in indices]
        bounds = [(start, start + int(self.lengths[i]) + 1) for start, i in zip(starts, indices, strict=True)]
        return [_sample(span) for span in self._reader.read_many(bounds)]

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return int(self.lengths.max())

    def unigram_entropy(self) -> float:
        """Return −Σ p ln p in nats per token, with p the share of each token among those that are trained on.

        The loss of the best model that knows token frequencies but not their order. Of a large dataset, the share in
        `MOST_COUNTED` evenly spaced samples: its tokens may be on a remote storage.

        Raises:
            ValueError: The dataset is empty.
        """
        occurrences = np.zeros(0, np.int64)
        for labels in self._labels():
            more = np.bincount(labels, minlength=len(occurrences))
            more[: len(occurrences)] += occurrences
            occurrences = more
        total = int(occurrences.sum())
        if total == 0:
            raise ValueError("the dataset has no token to train on, so its unigram entropy is undefined.")
        # ln N − Σ n ln n / N over the counts n: the same sum, and exactly 0 for one distinct token.
        counts = torch.from_numpy(occurrences[occurrences > 0]).to(torch.float64)
        return max(0.0, math.log(total) - float((counts * counts.log()).sum()) / total)

    def _labels(self) -> Iterator[NDArray[np.int32]]:
        """Yield the tokens that are trained on of at most `MOST_COUNTED` samples, those of some samples at a time."""
        counted = min(len(self), MOST_COUNTED)
        samples = np.arange(counted, dtype=np.int64) * len(self) // max(1, counted)
        for first in range(0, counted, _CHUNK):
            chosen = samples[first : first + _CHUNK]
            starts = self._starts[chosen] + 1
            stops = starts + self.lengths[chosen]
            spans = self._reader.read_many(list(zip(starts.tolist(), stops.tolist(), strict=True)))
            yield np.concatenate([span.tokens[span.trained] for span in spans])


def _sample(span: Span) -> dict[str, Tensor]:
    """Return a sample of consecutive tokens, of which the last one is a label only."""
    tokens = torch.from_numpy(span.tokens.astype(np.int64))
    labels = np.where(span.trained[1:], span.tokens[1:], IGNORED).astype(np.int64)
    sample = {"input_ids": tokens[:-1], "labels": torch.from_numpy(labels)}
    if span.weights is not None:
        sample["weights"] = torch.from_numpy(span.weights[1:].copy())
    return sample


def encode(
    documents: Sequence[Document],
    tokenizer: AnyTokenizer,
    *,
    max_length: int,
    train_on: TrainOn = "all-assistant",
    broken: list[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TokenDataset, Counts]:
    """Encode documents in memory as samples of at most ``max_length`` tokens; count documents, samples and tokens.

    Longer documents are cut into pieces of ``max_length`` tokens, the last one shorter. Only pieces without a token to
    train on are left out; they are counted.

    Args:
        documents: An empty sequence yields an empty dataset.
        tokenizer: Needs an end token, and for conversations a chat template.
        max_length: Tokens of the longest sample, at least 1.
        train_on: Which turns of conversations are trained on.
        broken: As for :func:`~bigbatch.lm.data.tokenization.encode_documents`.
        progress: Called with (documents done, documents) after each batch.

    Raises:
        InputError: A document yields no training token, or the tokenizer cannot encode it; the message has its source.
        ValueError: ``max_length`` is below 1.
    """
    if max_length < 1:
        raise ValueError(f"max_length={max_length} leaves no token in a sample. Use at least 1.")
    encoder = DocumentEncoder(tokenizer, train_on=train_on)
    blocks = []
    done = 0
    for batch in batches(documents, encoder):
        blocks.append(encode_batch(batch, encoder, skip_broken=broken is not None))
        done += blocks[-1].documents + len(blocks[-1].broken)
        if progress is not None:
            progress(done, len(documents))
    found = [reason for block in blocks for reason in block.broken]
    if found and broken is not None:
        broken += found
        if len(found) == len(documents):
            raise InputError(found[0])
    reader = MemoryTokens(concatenated(blocks))
    training, _ = make_samples(reader, max_length=max_length, split=HashSplit())
    return TokenDataset(reader, training), replace(training.counts, broken=len(found))


def collate(samples: Sequence[dict[str, Tensor]], *, pad_id: int) -> dict[str, Tensor]:
    """Collate samples into one right-padded micro-batch.

    Args:
        samples: Items of a :class:`TokenDataset`, at least one.
        pad_id: Token that pads ``input_ids``; its positions have no label and are not attended to.

    Returns:
        ``input_ids``, ``labels`` and ``attention_mask`` (1 for a token, 0 for padding), int64 ``[samples, longest]``;
        if a sample has ``weights``, those too, float32.

    Raises:
        ValueError: ``samples`` is empty.
    """
    if not samples:
        raise ValueError("there is no sample to collate. Pass at least one.")
    inputs = [sample["input_ids"] for sample in samples]
    microbatch = {
        "input_ids": pad_sequence(inputs, batch_first=True, padding_value=pad_id),
        "labels": pad_sequence([sample["labels"] for sample in samples], batch_first=True, padding_value=IGNORED),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in inputs], batch_first=True),
    }
    if (weights := weights_of(samples)) is not None:
        microbatch["weights"] = pad_sequence(weights, batch_first=True)
    return microbatch


def weights_of(samples: Sequence[dict[str, Tensor]]) -> list[Tensor] | None:
    """Return the weights of the labels of each sample, float32 ``[length]``: 1 for labels of a sample without weights.

    None if no sample has weights.
    """
    if not any("weights" in sample for sample in samples):
        return None
    return [
        sample["weights"] if "weights" in sample else (sample["labels"] != IGNORED).to(torch.float32)
        for sample in samples
    ]
