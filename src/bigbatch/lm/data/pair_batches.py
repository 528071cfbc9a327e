"""Micro-batches of samples with several sequences.

samples of a `PairDataset` → `collate_pairs` → all first sequences, then all second ones, padded to the longest
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bigbatch.lm.data.dataset import IGNORED
from bigbatch.lm.data.pairs import Objective

NO_INDEX = -1
"""Index of a sample that does not count."""


def sample_length(sample: dict[str, Any]) -> int:
    """Return the tokens of a sample of one or several sequences in a micro-batch, as its data set counts them."""
    if "sequences" in sample:
        return len(sample["sequences"]) * max(map(len, sample["sequences"]))
    return len(sample["input_ids"])


def sequences_of(sample: dict[str, Any]) -> list[Tensor]:
    """Return the tokens of each sequence of a sample."""
    found: list[Tensor] = sample.get("sequences") or [sample["input_ids"]]
    return found


def placeholder_samples(lengths: Sequence[int], objective: Objective, *, num_parts: int) -> list[dict[str, Any]]:
    """Return samples with these lengths, as a `PairDataset` counts them, whose tokens are all 0."""
    samples = []
    for index, length in enumerate(lengths):
        row = torch.zeros(max(1, length // num_parts), dtype=torch.int64)
        sample: dict[str, Any] = {"sequences": [row] * num_parts, "index": torch.tensor(index)}
        if objective == "dpo":
            sample |= {"answers": [torch.ones_like(row, dtype=torch.bool)] * num_parts}
            sample |= {"reference": torch.zeros(num_parts)}
        samples.append(sample)
    return samples


def collate_pairs(samples: Sequence[dict[str, Any]], *, pad_id: int) -> dict[str, Tensor]:
    """Collate samples into one right-padded micro-batch.

    Args:
        samples: Of a `PairDataset`, at least one.
        pad_id: Token that pads ``input_ids``; its positions are not attended to.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 ``[parts · samples, longest]``, all first parts, then all second
        ones, and so on; ``index``, int64 ``[samples]``. If the samples have them, ``present``, bool ``[samples,
        parts]``; ``reference``, ``[samples, parts]``, and ``labels``, int64 as ``input_ids``: the next token if it
        belongs to an answer, else -100.

    Raises:
        ValueError: ``samples`` is empty.
    """
    if not samples:
        raise ValueError("there is no sample to collate. Pass at least one.")
    num_parts = len(samples[0]["sequences"])
    order = [(sample, part) for part in range(num_parts) for sample in samples]
    rows = [sample["sequences"][part] for sample, part in order]
    microbatch = {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "index": torch.stack([sample["index"] for sample in samples]),
    }
    if "answers" in samples[0]:
        answers = [sample["answers"][part] for sample, part in order]
        labels = [_next(row, answer) for row, answer in zip(rows, answers, strict=True)]
        microbatch["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    for name in ("reference", "present"):
        if name in samples[0]:
            microbatch[name] = torch.stack([sample[name] for sample in samples])
    return microbatch


def _next(tokens: Tensor, answer: Tensor) -> Tensor:
    """Return for each token the next one, if it belongs to the answer."""
    labels = torch.full_like(tokens, IGNORED)
    labels[:-1] = torch.where(answer[1:], tokens[1:], IGNORED)
    return labels
