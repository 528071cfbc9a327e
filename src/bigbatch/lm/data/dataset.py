"""Tokenized samples of documents: every trained token is the label of exactly one position of one sample.

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

from bigbatch.lm.data.conversations import TrainOn
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.tokenization import Encoded, encode_documents
from bigbatch.lm.data.tokenizer import AnyTokenizer
from bigbatch.lm.data.validation_split import split_documents
from bigbatch.lm.text import plural

__all__ = ["IGNORED", "Counts", "TokenDataset", "collate", "encode", "split_documents", "weights_of"]

IGNORED = -100
"""Label of a position whose next token is not trained on: torch's default ``ignore_index``."""


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


class TokenDataset:
    """Samples of one flat token sequence; a sample is a piece of one document.

        input_ids[j] = tokens[start + j]
        labels[j]    = tokens[start + j + 1] if it is trained on, else -100            0 ≤ j < length

        weights[j]   = token_weights[start + j + 1]                                    if there are any

    The last label of a piece is the first input of the document's next piece. Labels are already shifted: the target
    of the logits at position j is ``labels[j]``.

    Attributes:
        tokens: int32 ``[tokens]`` on the CPU, the documents concatenated.
        trained: bool ``[tokens]``, whether a token is trained on.
        token_weights: float32 ``[tokens]``, the weight of a token's loss, 0 if it is not trained on; None if all are 1.
        lengths: Tokens of each sample, without padding.
        label_counts: Labels of each sample, at least 1.
    """

    def __init__(
        self,
        tokens: Tensor,
        trained: Tensor,
        samples: Sequence[tuple[int, int, int]],
        *,
        token_weights: Tensor | None = None,
    ) -> None:
        """Store ``samples``: (start, length, document index) triples."""
        self.tokens = tokens
        self.trained = trained
        self.token_weights = token_weights
        self._samples = list(samples)
        self.lengths = [length for _, length, _ in self._samples]
        starts, lengths, _ = torch.tensor(self._samples, dtype=torch.int64).reshape(-1, 3).unbind(1)
        trained_up_to = trained.cumsum(0)  # inclusive
        labels = trained_up_to[starts + lengths] - trained_up_to[starts]
        self.label_counts: list[int] = labels.tolist()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``labels``, int64 ``[length]``, of one sample, and ``weights`` if there are any."""
        start, length, _ = self._samples[index]
        tokens = self.tokens[start : start + length + 1].to(torch.int64)
        labels = tokens[1:].masked_fill(~self.trained[start + 1 : start + length + 1], IGNORED)
        sample = {"input_ids": tokens[:-1], "labels": labels}
        if self.token_weights is not None:
            sample["weights"] = self.token_weights[start + 1 : start + length + 1].clone()
        return sample

    def document_of(self, index: int) -> int:
        """Return the index of the encoded document that a sample belongs to."""
        return self._samples[index][2]

    def fingerprint(self) -> str:
        """Return the SHA-256, in hex, of the tokens, the training mask, the weights and the bounds of the samples."""
        digest = hashlib.sha256(self.tokens.numpy().tobytes())
        digest.update(self.trained.numpy().tobytes())
        if self.token_weights is not None:
            digest.update(self.token_weights.numpy().tobytes())
        digest.update(torch.tensor(self._samples, dtype=torch.int64).numpy().tobytes())
        return digest.hexdigest()

    @property
    def label_tokens(self) -> Tensor:
        """Tokens that are trained on, int32 ``[label_tokens]``, in the order of the documents."""
        return self.tokens[self.trained]

    def unigram_entropy(self) -> float:
        """Return −Σ p ln p in nats per token, with p the share of each token among those that are trained on.

        The loss of the best model that knows token frequencies but not their order.

        Raises:
            ValueError: The dataset is empty.
        """
        total = len(self.label_tokens)
        if total == 0:
            raise ValueError("the dataset has no token to train on, so its unigram entropy is undefined.")
        # ln N − Σ n ln n / N over the counts n: the same sum, and exactly 0 for one distinct token.
        occurrences = torch.unique(self.label_tokens, return_counts=True)[1].to(torch.float64)
        return max(0.0, math.log(total) - float((occurrences * occurrences.log()).sum()) / total)


def encode(
    documents: Sequence[Document],
    tokenizer: AnyTokenizer,
    *,
    max_length: int,
    train_on: TrainOn = "all-assistant",
    broken: list[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TokenDataset, Counts]:
    """Encode documents as samples of at most ``max_length`` tokens, and count documents, samples and tokens.

    Longer documents are cut into pieces of ``max_length`` tokens, the last one shorter. Only pieces without a token to
    train on are left out; they are counted.

    Args:
        documents: An empty sequence yields an empty dataset.
        tokenizer: Needs an end token, and for conversations a chat template.
        max_length: Tokens of the longest sample, at least 1.
        train_on: Which turns of conversations are trained on.
        broken: As for :func:`~bigbatch.lm.data.tokenization.encode_documents`.
        progress: Called with (documents done, documents) every 100 documents and at the end.

    Raises:
        InputError: A document yields no training token, or the tokenizer cannot encode it; the message has its source.
        ValueError: ``max_length`` is below 1.
    """
    if max_length < 1:
        raise ValueError(f"max_length={max_length} leaves no token in a sample. Use at least 1.")
    parts = _Parts(max_length)
    num_broken = len(broken or ())
    for encoded in encode_documents(documents, tokenizer, train_on=train_on, broken=broken):
        if progress is not None and encoded.document // 100 > max(0, parts.last_document) // 100:
            progress(encoded.document // 100 * 100, len(documents))
        parts.add(encoded)
    if progress is not None and documents:
        progress(len(documents), len(documents))
    num_broken = len(broken or ()) - num_broken
    return parts.dataset(), parts.counts(len(documents) - num_broken, broken=num_broken)


class _Parts:
    """Encoded documents, concatenated, and the bounds of their samples."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._tokens = array("i")
        self._trained = bytearray()
        self._weights: array[float] | None = None
        self._samples: list[tuple[int, int, int]] = []
        self._cut: set[int] = set()
        self._turn_by_turn: set[int] = set()
        self._left_out = 0
        self.last_document = -1

    def add(self, encoded: Encoded) -> None:
        pieces = _pieces(encoded, self._max_length)
        start = len(self._tokens)
        usable = [(first, length) for first, length in pieces if 1 in encoded.trained[first + 1 : first + length + 1]]
        self._samples += [(start + first, length, encoded.document) for first, length in usable]
        if len(pieces) > 1:
            self._cut.add(encoded.document)
        if encoded.document == self.last_document:
            self._turn_by_turn.add(encoded.document)
        self.last_document = encoded.document
        self._left_out += len(pieces) - len(usable)
        if encoded.weights is not None and self._weights is None:
            self._weights = array("f", iter(self._trained))
        if self._weights is not None:
            self._weights.extend(array("f", iter(encoded.trained)) if encoded.weights is None else encoded.weights)
        self._tokens.extend(encoded.tokens)
        self._trained += encoded.trained

    def dataset(self) -> TokenDataset:
        # frombuffer refuses an empty buffer; the clone releases a buffer that Python may move.
        if not self._tokens:
            return TokenDataset(torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.bool), [])
        tokens = torch.frombuffer(self._tokens, dtype=torch.int32).clone()
        trained = torch.frombuffer(self._trained, dtype=torch.bool).clone()
        weights = None if self._weights is None else torch.frombuffer(self._weights, dtype=torch.float32).clone()
        return TokenDataset(tokens, trained, self._samples, token_weights=weights)

    def counts(self, documents: int, *, broken: int) -> Counts:
        return Counts(
            documents=documents,
            samples=len(self._samples),
            cut_documents=len(self._cut),
            tokens=len(self._tokens),
            label_tokens=sum(self._trained),
            masked_pieces_left_out=self._left_out,
            turn_by_turn=len(self._turn_by_turn),
            broken=broken,
        )


def _pieces(encoded: Encoded, max_length: int) -> list[tuple[int, int]]:
    """Return (start, length) of the pieces of a document's inputs; its last token is only a label."""
    inputs = len(encoded.tokens) - 1
    return [(start, min(max_length, inputs - start)) for start in range(0, inputs, max_length)]


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
