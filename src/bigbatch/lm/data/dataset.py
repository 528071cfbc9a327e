"""Documents as samples: every token to learn is the label of exactly one position of exactly one sample.

documents → split_documents → encode → TokenDataset → samples → collate → micro-batch
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.tokenization import Encoded, encode_documents
from bigbatch.lm.data.tokenizer import AnyTokenizer
from bigbatch.lm.data.validation_split import split_documents
from bigbatch.lm.text import plural

__all__ = ["IGNORED", "Counts", "TokenDataset", "collate", "encode", "split_documents"]

IGNORED = -100
"""Label of a position whose next token is not learned: torch's default ``ignore_index``."""


@dataclass(frozen=True)
class Counts:
    """What became of the documents.

    Attributes:
        documents: Documents encoded.
        samples: Pieces to train on.
        cut_documents: Documents longer than one piece.
        tokens: Tokens of all documents, special ones included.
        label_tokens: Tokens that are learned, each once in an epoch.
        masked_pieces_left_out: Pieces of long documents in which nothing is learned.
    """

    documents: int = 0
    samples: int = 0
    cut_documents: int = 0
    tokens: int = 0
    label_tokens: int = 0
    masked_pieces_left_out: int = 0

    def describe(self) -> str:
        """Return the counts as one line for the user."""
        parts = [
            f"{plural(self.documents, 'document')} with {plural(self.tokens, 'token')}, "
            f"{self.label_tokens:,} of them learned",
            f"{plural(self.samples, 'sequence')}",
        ]
        if self.cut_documents:
            parts.append(f"{plural(self.cut_documents, 'long document')} cut into pieces")
        if self.masked_pieces_left_out:
            parts.append(f"{plural(self.masked_pieces_left_out, 'piece')} with nothing to learn left out")
        return "; ".join(parts)


class TokenDataset:
    """Samples of one flat run of tokens; a sample is a piece of one document.

        input_ids[j] = tokens[start + j]
        labels[j]    = tokens[start + j + 1] if it is learned, else -100            0 ≤ j < length

    The last label of a piece is the first input of the document's next piece. Labels are shifted already: the logits
    at position j are compared with ``labels[j]``.

    Attributes:
        tokens: int32 ``[tokens]`` on the CPU, the documents one after the other.
        trained: bool ``[tokens]``, whether a token is learned.
        lengths: Tokens of each sample, without padding.
        label_counts: Labels of each sample, at least 1.
    """

    def __init__(self, tokens: Tensor, trained: Tensor, samples: Sequence[tuple[int, int, int]]) -> None:
        """Take ``samples`` as (start, length, document index) triples."""
        self.tokens = tokens
        self.trained = trained
        self._samples = list(samples)
        self.lengths = [length for _, length, _ in self._samples]
        starts, lengths, _ = torch.tensor(self._samples, dtype=torch.int64).reshape(-1, 3).unbind(1)
        learned_up_to = trained.cumsum(0)  # tokens learned up to and with each
        labels = learned_up_to[starts + lengths] - learned_up_to[starts]
        self.label_counts: list[int] = labels.tolist()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``labels``, int64 ``[length]``, of one sample."""
        start, length, _ = self._samples[index]
        tokens = self.tokens[start : start + length + 1].to(torch.int64)
        labels = tokens[1:].masked_fill(~self.trained[start + 1 : start + length + 1], IGNORED)
        return {"input_ids": tokens[:-1], "labels": labels}

    def document_of(self, index: int) -> int:
        """Return the index, among the encoded documents, of the one that a sample is a piece of."""
        return self._samples[index][2]

    def fingerprint(self) -> str:
        """Give the SHA-256, in hex, of every token, what is learned of it, and where samples begin and end."""
        digest = hashlib.sha256(self.tokens.numpy().tobytes())
        digest.update(self.trained.numpy().tobytes())
        digest.update(torch.tensor(self._samples, dtype=torch.int64).numpy().tobytes())
        return digest.hexdigest()

    @property
    def label_tokens(self) -> Tensor:
        """Every token that is learned, int32 ``[label_tokens]``, in the order of the documents."""
        return self.tokens[self.trained]

    def unigram_entropy(self) -> float:
        """Return −Σ p ln p in nats per token, with p the share of each token among those that are learned.

        It is the loss of the best model that knows how frequent tokens are and nothing of their order.

        Raises:
            ValueError: The dataset is empty.
        """
        total = len(self.label_tokens)
        if total == 0:
            raise ValueError("the dataset has no token to learn, so there is no distribution to take the entropy of.")
        # ln N − Σ n ln n / N over the counts n: the same sum, and exactly 0 for one distinct token.
        occurrences = torch.unique(self.label_tokens, return_counts=True)[1].to(torch.float64)
        return max(0.0, math.log(total) - float((occurrences * occurrences.log()).sum()) / total)


def encode(
    documents: Sequence[Document],
    tokenizer: AnyTokenizer,
    *,
    max_length: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TokenDataset, Counts]:
    """Turn documents into samples of at most ``max_length`` tokens, and count what became of them.

    Longer documents are cut into pieces of ``max_length``, the last one shorter. A piece in which nothing is learned
    is left out and counted; nothing else is.

    Args:
        documents: None at all make an empty dataset.
        tokenizer: With an end token; conversations also need its chat template.
        max_length: Tokens of the longest sample, at least 1.
        progress: Called with (documents done, documents) now and then, and at the end.

    Raises:
        InputError: A document yields no training token, or the tokenizer cannot encode it; names its source.
        ValueError: ``max_length`` is below 1.
    """
    if max_length < 1:
        raise ValueError(f"max_length={max_length} leaves no token in a sample. Use at least 1.")
    tokens = array("i")
    trained = bytearray()
    samples: list[tuple[int, int, int]] = []
    cut = left_out = 0
    for index, encoded in enumerate(encode_documents(documents, tokenizer)):
        pieces = _pieces(encoded, max_length)
        learned = [(first, length) for first, length in pieces if 1 in encoded.trained[first + 1 : first + length + 1]]
        samples += [(len(tokens) + first, length, index) for first, length in learned]
        cut += len(pieces) > 1
        left_out += len(pieces) - len(learned)
        tokens.extend(encoded.tokens)
        trained += encoded.trained
        if progress is not None and (index % 100 == 99 or index + 1 == len(documents)):
            progress(index + 1, len(documents))
    counts = Counts(len(documents), len(samples), cut, len(tokens), sum(trained), left_out)
    # frombuffer refuses a buffer without a byte; the clone lets go of a buffer that Python may move.
    flat = torch.frombuffer(tokens, dtype=torch.int32).clone() if tokens else torch.empty(0, dtype=torch.int32)
    mask = torch.frombuffer(trained, dtype=torch.bool).clone() if trained else torch.empty(0, dtype=torch.bool)
    return TokenDataset(flat, mask, samples), counts


def _pieces(encoded: Encoded, max_length: int) -> list[tuple[int, int]]:
    """Cut a document into (start, length) of its inputs; its last token is a label only."""
    inputs = len(encoded.tokens) - 1
    return [(start, min(max_length, inputs - start)) for start in range(0, inputs, max_length)]


def collate(samples: Sequence[dict[str, Tensor]], *, pad_id: int) -> dict[str, Tensor]:
    """Put samples into one padded micro-batch.

    Args:
        samples: As a :class:`TokenDataset` gives them, at least one.
        pad_id: Token that fills ``input_ids`` on the right; its positions have no label and are not attended to.

    Returns:
        ``input_ids``, ``labels`` and ``attention_mask`` (1 for a token, 0 for padding), int64 ``[samples, longest]``.

    Raises:
        ValueError: There is no sample.
    """
    if not samples:
        raise ValueError("there is no sample to collate. Give at least one.")
    inputs = [sample["input_ids"] for sample in samples]
    return {
        "input_ids": pad_sequence(inputs, batch_first=True, padding_value=pad_id),
        "labels": pad_sequence([sample["labels"] for sample in samples], batch_first=True, padding_value=IGNORED),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in inputs], batch_first=True),
    }
