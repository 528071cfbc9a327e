"""Datasets that Python code passes: tokenized samples, and records of the shapes of `bigbatch.lm.data.records`.

rows → check_rows → tokenized samples: SampleDataset | records: a Corpus, which is tokenized as a file is
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bigbatch.errors import InputError, first_line
from bigbatch.lm.data.corpus import Corpus
from bigbatch.lm.data.dataset import IGNORED, TokenDataset, collate
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.messages import listing
from bigbatch.lm.data.reading import Reading, ReadOptions
from bigbatch.lm.data.record_files import to_documents
from bigbatch.lm.data.records import shape_notes, without_nulls
from bigbatch.lm.data.token_store.samples import Counts
from bigbatch.lm.text import plural

COLLATED = ("input_ids", "labels", "weights")  # columns of a sample that the loss of the trainer knows


class Rows(Protocol):
    """A sequence of samples or records, such as a list, a map-style torch dataset or a ``datasets.Dataset``."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, index: int, /) -> Any:
        """Return one row, the same whenever it is called."""


def check_rows(rows: Any, name: str) -> Rows:
    """Return rows that have a length, an index, and a mapping as their first row.

    Args:
        rows: What the user passed.
        name: Of the argument, for messages.

    Raises:
        InputError: They have not.
    """
    if isinstance(rows, Mapping):
        raise InputError(
            f"{name} has {listing(rows)}: pass one of its entries, such as {name}[{next(iter(rows), '')!r}]."
        )
    if isinstance(rows, str) or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise InputError(
            f"{name} is {type(rows).__name__}, and must have a length and an index, because samples are read in a "
            "random order: pass a list, a map-style dataset or a datasets.Dataset."
        )
    if not len(rows):
        raise InputError(f"{name} is empty. Pass at least one sample.")
    if not isinstance(rows[0], Mapping):
        raise InputError(
            f"{name}[0] is {type(rows[0]).__name__}, and must be a dict with 'input_ids', or a record such as "
            "{'text': ...} or {'messages': [...]}."
        )
    found: Rows = rows
    return found


def has_samples(rows: Rows) -> bool:
    """Return whether rows are tokenized samples, and not records."""
    return "input_ids" in rows[0]


def corpus_of(rows: Rows, name: str, options: ReadOptions) -> Corpus:
    """Return the records of a dataset as a corpus."""

    def read(reading: Reading) -> Iterator[Document]:
        shapes: dict[str, int] = {}
        records = ((without_nulls(rows[index]), f"{name}[{index}]") for index in range(len(rows)))
        for document in to_documents(records, reading):
            shapes[document.shape] = shapes.get(document.shape, 0) + 1
            yield document
        reading.about.append(f"{plural(sum(shapes.values()), 'record')} of {name}")
        reading.about.extend(shape_notes(shape for shape, number in shapes.items() for _ in range(number)))

    return Corpus(read, name=name, options=options)


class SampleDataset(TokenDataset):
    """Tokenized samples that Python code passes, read from it again whenever they are needed.

        row    = {"input_ids": t, "labels": u, "weights": w, more: v}      each [length + 1]; labels by default t
        sample = {"input_ids": t[:-1], "labels": u[1:], "weights": w[1:], more: v[1:], or v if it is a number}

    Each row is read once here, for its length and a digest of its content; a row that differs later is an error.

    Args:
        rows: The samples.
        name: Of the rows, for messages.
        max_length: Largest number of inputs of a sample.
        num_tokens: Tokens of the vocabulary.
        with_more: Whether the loss accepts other columns, and samples without a label.
        progress: Called with the rows done so far.

    Attributes:
        keys: uint64 ``[samples]``, the first 64 bits of the digest of each.
        fingerprint: SHA-256 of all samples, in hex.

    Raises:
        InputError: A row is no sample; the message says which, and why.
    """

    def __init__(
        self,
        rows: Rows,
        name: str,
        *,
        max_length: int,
        num_tokens: int,
        with_more: bool = False,
        progress: Callable[[int], object] = lambda done: None,
    ) -> None:
        self._rows = rows
        self._name = name
        self._limits = max_length, num_tokens, with_more
        number = len(rows)
        self._places = np.arange(number)
        self.lengths = np.zeros(number, np.int32)
        self.label_counts = np.zeros(number, np.int32)
        self.keys = np.zeros(number, np.uint64)
        total = hashlib.sha256()
        names = self._read(0).keys() - {"weights"}
        for index in range(number):
            sample = self._read(index)
            if sample.keys() - {"weights"} != names:
                raise InputError(
                    f"{name}[{index}] has {listing(sample)}, and {name}[0] has {listing(names)}: all samples must have "
                    "the same columns."
                )
            digest = _digest(sample)
            total.update(digest)
            self.lengths[index] = len(sample["input_ids"])
            self.label_counts[index] = int((sample["labels"] != IGNORED).sum())
            self.keys[index] = int.from_bytes(digest[:8], "big")
            if index % 1000 == 999:
                progress(index + 1)
        self.fingerprint = total.hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sample.

        Raises:
            InputError: It is not what it was when the dataset was opened.
        """
        if index >= len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        place = int(self._places[index])
        sample = self._read(place)
        if int.from_bytes(_digest(sample)[:8], "big") != int(self.keys[index]):
            raise InputError(
                f"{self._name}[{place}] has changed since the run started: it must be the same whenever it is read, so "
                "that the run can be resumed."
            )
        return sample

    def take(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return several samples."""
        return [self[index] for index in indices]

    def part(self, chosen: NDArray[np.bool_]) -> SampleDataset:
        """Return the dataset of some of the samples."""
        part = object.__new__(SampleDataset)
        part._rows, part._name, part._limits, part.fingerprint = self._rows, self._name, self._limits, self.fingerprint
        part._places, part.keys = self._places[chosen], self.keys[chosen]
        part.lengths, part.label_counts = self.lengths[chosen], self.label_counts[chosen]
        return part

    @property
    def counts(self) -> Counts:
        """The numbers of samples and tokens."""
        number, labels = len(self), int(self.label_counts.sum(dtype=np.int64))
        return Counts(documents=number, samples=number, tokens=self.num_tokens + number, label_tokens=labels)

    def _labels(self) -> Iterator[NDArray[np.int32]]:
        for index in range(len(self)):
            labels = self[index]["labels"]
            yield labels[labels != IGNORED].numpy().astype(np.int32)

    def _read(self, place: int) -> dict[str, Tensor]:
        max_length, num_tokens, with_more = self._limits
        return to_sample(
            self._rows[place],
            f"{self._name}[{place}]",
            max_length=max_length,
            num_tokens=num_tokens,
            with_more=with_more,
        )


def to_sample(row: Any, place: str, *, max_length: int, num_tokens: int, with_more: bool) -> dict[str, Tensor]:
    """Return the sample of a row, as `SampleDataset` describes it.

    Raises:
        InputError: The row is no sample.
    """
    if not isinstance(row, Mapping) or row.get("input_ids") is None:
        raise InputError(f"{place} has no 'input_ids', and {place.partition('[')[0]}[0] has.")
    tokens = _whole_numbers(row["input_ids"], "input_ids", place)
    length = len(tokens)
    if length < 2:
        raise InputError(f"{place} has {plural(length, 'token')}: at least 2 are needed to predict one from another.")
    if length - 1 > max_length:
        raise InputError(
            f"{place} has {length:,} tokens, and max_length is {max_length:,}: a sample has at most one token "
            "more. Shorten it, or raise max_length."
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= num_tokens:
        wrong = int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())
        raise InputError(f"{place} has the token {wrong}, and the tokenizer of the model has 0 to {num_tokens - 1}.")
    _check_mask(row.get("attention_mask"), place)
    labels = tokens if row.get("labels") is None else _whole_numbers(row["labels"], "labels", place)
    _check_length(labels, length, "labels", place)
    if bool(((labels != IGNORED) & ((labels < 0) | (labels >= num_tokens))).any()):
        raise InputError(f"{place}: 'labels' must be {IGNORED}, for what is not trained on, or tokens of the model.")
    sample = {"input_ids": tokens[:-1], "labels": labels[1:]}
    if row.get("weights") is not None:
        weights = _numbers(row["weights"], "weights", place).to(torch.float32)
        _check_length(weights, length, "weights", place)
        if not bool((weights >= 0).all()) or math.isinf(float(weights.max())):
            raise InputError(f"{place}: 'weights' must be finite and not negative.")
        weights = torch.where(sample["labels"] == IGNORED, 0.0, weights[1:])
        sample["weights"], sample["labels"] = weights, torch.where(weights == 0, IGNORED, sample["labels"])
    more = [name for name in row if name not in (*COLLATED, "attention_mask") and row[name] is not None]
    if more and not with_more:
        raise InputError(
            f"{place} has {listing(more)}, which the loss does not use. Remove it, or pass a loss_fn that does."
        )
    if not with_more and not bool((sample["labels"] != IGNORED).any()):
        raise InputError(f"{place} has no label to train on. Leave it out.")
    for name in more:
        value = _numbers(row[name], name, place)
        if value.dim():
            _check_length(value, length, name, place)
        sample[name] = value[1:] if value.dim() else value
    return sample


def collate_more(samples: Sequence[dict[str, Tensor]], *, pad_id: int) -> dict[str, Tensor]:
    """Collate samples as `collate` does, with their other columns: numbers ``[samples]``, arrays padded with 0."""
    microbatch = collate(samples, pad_id=pad_id)
    for name in samples[0].keys() - set(COLLATED):
        values = [sample[name] for sample in samples]
        microbatch[name] = pad_sequence(values, batch_first=True) if values[0].dim() else torch.stack(values)
    return microbatch


def _numbers(value: Any, name: str, place: str) -> Tensor:
    try:
        found = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{place}: {name!r} is no number and no list of numbers ({first_line(error)}).") from None
    if found.dim() > 1:
        raise InputError(f"{place}: {name!r} has {found.dim()} dimensions: pass one sample, without a batch dimension.")
    return found


def _whole_numbers(value: Any, name: str, place: str) -> Tensor:
    found = _numbers(value, name, place)
    if found.dim() != 1 or found.dtype.is_floating_point or found.dtype == torch.bool:
        raise InputError(f"{place}: {name!r} must be a list of whole numbers.")
    return found.to(torch.int64)


def _check_length(values: Tensor, length: int, name: str, place: str) -> None:
    if values.dim() != 1 or len(values) != length:
        raise InputError(
            f"{place} has {length:,} tokens and {name!r} of {values.numel():,}: pass one for each token; "
            "bigbatch shifts them."
        )


def _check_mask(mask: Any, place: str) -> None:
    if mask is not None and not bool(_numbers(mask, "attention_mask", place).all()):
        raise InputError(f"{place} has padding in 'attention_mask': pass samples without padding; bigbatch adds it.")


def _digest(sample: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(sample):
        tensor = sample[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()
