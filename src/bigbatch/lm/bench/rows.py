"""Micro-batches of equal size, cut from the batch of a workload for loops that compile one shape.

samples → whole documents in packed rows, or one stream of tokens in full rows → ids, labels, offsets
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from bigbatch.lm.bench.workload import Sample, count_tokens, shift
from bigbatch.lm.data.dataset import IGNORED

MULTIPLE = 8  # of the tokens of a row: matrix products are slower with others


@dataclass(frozen=True)
class Rows:
    """One micro-batch.

    Attributes:
        ids: int64 ``[rows, length]``.
        labels: The next token of each, int64 ``[rows, length]``; -100 for none.
        positions: Position of each token in its document, or in its row, int64 ``[rows, length]``.
        offsets: int32 ``[parts + 1]``: where the parts of the flattened rows start that do not attend to one another,
            then the number of tokens. Parts may be empty.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    offsets: Tensor

    def to(self, device: torch.device) -> "Rows":
        """Copy to a device."""
        return Rows(*(getattr(self, name).to(device, non_blocking=True) for name in Rows.__dataclass_fields__))

    def pinned(self) -> "Rows":
        """Copy to pinned memory of the host."""
        return Rows(*(getattr(self, name).pin_memory() for name in Rows.__dataclass_fields__))


def num_microbatches(samples: Sequence[Sample], *, rows: int, longest: int) -> int:
    """Return the smallest number of micro-batches of at most ``rows · longest`` tokens."""
    return math.ceil(count_tokens(samples) / (rows * longest))


def pack_documents(samples: Sequence[Sample], *, rows: int, longest: int) -> list[Rows]:
    """Pack whole documents into micro-batches of one row each, of equal length and about ``rows · longest`` tokens.

    The longest document goes first, each into the row with the fewest tokens.

    Args:
        samples: With the labels of transformers, which are the ids.
        rows: Sets the number of tokens.
        longest: Likewise.
    """
    documents = sorted(shift(samples), key=lambda sample: -len(sample["input_ids"]))
    bins: list[list[Sample]] = [[] for _ in range(num_microbatches(samples, rows=rows, longest=longest))]
    for document in documents:
        min(bins, key=count_tokens).append(document)
    length = _round_up(max(map(count_tokens, bins)))
    parts = max(map(len, bins)) + 1  # the padding is a part of its own
    return [_pack(documents, length, parts) for documents in bins]


def _pack(documents: Sequence[Sample], length: int, parts: int) -> Rows:
    ends = list(accumulate((len(document["input_ids"]) for document in documents), initial=0))
    padding = length - ends[-1]
    offsets = ends + [length] * (parts + 1 - len(ends))
    positions = [torch.arange(end - start) for start, end in pairwise([*ends, length])]
    ids = torch.cat([*(document["input_ids"] for document in documents), torch.zeros(padding, dtype=torch.int64)])
    labels = torch.cat([*(document["labels"] for document in documents), torch.full((padding,), IGNORED)])
    return Rows(ids[None], labels[None], torch.cat(positions)[None], torch.tensor(offsets, dtype=torch.int32))


def fill_rows(samples: Sequence[Sample], *, rows: int, longest: int) -> list[Rows]:
    """Cut the concatenated documents into full rows of equal length, at most ``longest``, whatever is cut in two.

    Rows are as short as the same number of micro-batches allows, so that fewer than 8 tokens a row are padding.

    Args:
        samples: As for `pack_documents`.
        rows: Rows of a micro-batch.
        longest: Maximum tokens of a row.
    """
    documents = shift(samples)
    count = num_microbatches(samples, rows=rows, longest=longest)
    tokens = count_tokens(samples)
    length = min(longest, _round_up(math.ceil(tokens / (count * rows))))
    padding = torch.zeros(count * rows * length - tokens, dtype=torch.int64)
    ids = torch.cat([*(document["input_ids"] for document in documents), padding])
    labels = torch.cat([*(document["labels"] for document in documents), padding + IGNORED])
    ends = accumulate(len(document["input_ids"]) for document in documents)
    cuts = sorted({*ends, *range(0, len(ids) + 1, length)})
    size = rows * length
    positions = torch.arange(length).expand(rows, length).contiguous()
    microbatches = []
    for start in range(0, len(ids), size):
        part = slice(start, start + size)
        offsets = torch.tensor([cut - start for cut in cuts if start <= cut <= start + size], dtype=torch.int32)
        microbatches.append(Rows(ids[part].view(rows, -1), labels[part].view(rows, -1), positions, offsets))
    return microbatches


def _round_up(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE
