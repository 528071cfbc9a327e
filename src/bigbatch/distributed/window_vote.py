"""What ranks tell one another at the end of a window, before the collective that could hang: one small gather.

each rank's Ballot, terms and reached parameters → numbers → gathered → Tally, the same on every rank
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor

MAX_TERMS = 8
BITS = 48  # parameters told of in one float64, which holds 53 bits exactly

Number: TypeAlias = float | Tensor
"""A number, or a 0-d tensor on any device."""


@dataclass(frozen=True)
class RankVote:
    """What one rank brings besides its losses.

    Attributes:
        failed: It ended the window by an error of its own.
        abandoned: It was told to drop the window.
        stopping: It was told to stop after this update.
        num_microbatches: Of the window, on this rank.
        tokens: Of the window, on this rank, without padding; 0 where nobody counts.
        peak_bytes: Highest memory so far; 0 where the platform does not tell.
        elapsed_s: From the opening of the window until its gradients were there.
        samples: Behind the window, on this rank; 0 where nobody counts.
        squared_norm_sum: Sum of the squared norms of its micro-gradients; NaN where they were not measured.
        squared_items_sum: Sum of the squared items of its micro-batches.
    """

    failed: bool = False
    abandoned: bool = False
    stopping: bool = False
    num_microbatches: int = 0
    tokens: int = 0
    peak_bytes: int = 0
    elapsed_s: float = 0.0
    samples: int = 0
    squared_norm_sum: Number = 0.0
    squared_items_sum: Number = 0.0


@dataclass(frozen=True)
class VoteResult:
    """What all ranks brought.

    Attributes:
        votes: One a rank, in their order.
        terms: ``(items, loss_sum)`` over all ranks, by the place of the term's name among the sorted names.
        has_gradient: Which parameters received a gradient on any rank.
    """

    votes: tuple[RankVote, ...]
    terms: tuple[tuple[float, float], ...]
    has_gradient: tuple[bool, ...]

    def ranks_with(self, flag: str) -> list[int]:
        """Give the ranks whose ballot has a flag."""
        return [rank for rank, vote in enumerate(self.votes) if getattr(vote, flag)]


def to_numbers(vote: RankVote, terms: Mapping[str, tuple[Number, Number]], reached: Sequence[bool]) -> list[Number]:
    """Write as numbers, of a count that depends on the number of parameters alone.

    Args:
        vote: Of this rank.
        terms: ``(items, loss_sum)`` of this rank, by name.
        reached: Which parameters received a gradient here.

    Raises:
        ValueError: There are more terms than a ballot has room for.
    """
    bits: list[Number] = []
    for start in range(0, len(reached), BITS):
        bits.append(float(sum(1 << i for i, flag in enumerate(reached[start : start + BITS]) if flag)))
    values: list[Number] = [getattr(vote, field.name) for field in fields(RankVote)]
    return [*values, *terms_to_numbers(terms), *bits]


def from_numbers(rows: Sequence[Sequence[float]], num_parameters: int) -> VoteResult:
    """Read what every rank wrote.

    Raises:
        ValueError: Ranks have other terms than one another.
    """
    width = len(fields(RankVote))
    end = width + 2 + 2 * MAX_TERMS
    votes = []
    for row in rows:
        kinds: list[Any] = [type(field.default) for field in fields(RankVote)]
        told: list[Any] = [kind(value) for kind, value in zip(kinds, row[:width], strict=True)]
        votes.append(RankVote(*told))
    reached = tuple(any(int(row[end + i // BITS]) >> (i % BITS) & 1 for row in rows) for i in range(num_parameters))
    return VoteResult(tuple(votes), terms_from_numbers([row[width:end] for row in rows]), reached)


def terms_to_numbers(terms: Mapping[str, tuple[Number, Number]]) -> list[Number]:
    """Write terms as numbers: how many, a mark of their names, and two numbers for each, sorted by name.

    Raises:
        ValueError: There are more of them than there is room for.
    """
    if len(terms) > MAX_TERMS:
        raise ValueError(f"the loss has {len(terms)} terms, and ranks can agree about {MAX_TERMS} at most.")
    mark = zlib.crc32("\n".join(sorted(terms)).encode()) if terms else 0
    numbers: list[Number] = [float(len(terms)), float(mark)]
    for name in sorted(terms):
        numbers += terms[name]
    return numbers + [0.0] * (2 + 2 * MAX_TERMS - len(numbers))


def terms_from_numbers(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    """Add up the terms of all ranks; one without any term has nothing to add.

    Raises:
        ValueError: Ranks have other terms than one another.
    """
    kinds = {(int(row[0]), int(row[1])) for row in rows if row[0]}
    if len(kinds) > 1:
        counts = ", ".join(f"rank {rank}: {int(row[0])}" for rank, row in enumerate(rows))
        raise ValueError(
            f"ranks have different terms of the loss (their numbers are {counts}): give the same names on every rank."
        )
    if not kinds:
        return ()
    ((number, _),) = kinds
    places = range(2, 2 + 2 * number, 2)
    return tuple((math.fsum(row[i] for row in rows), math.fsum(row[i + 1] for row in rows)) for i in places)


def name_ranks(ranks: Sequence[int]) -> str:
    """Name some ranks in a sentence."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def as_tensor(values: Sequence[Number], device: torch.device) -> Tensor:
    """Bring numbers and 0-d tensors together, float64 ``[values]``; nothing is waited for on the device itself."""
    plain = torch.tensor([0.0 if isinstance(value, Tensor) else float(value) for value in values], dtype=torch.float64)
    numbers = plain.to(device)
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    if places:
        tensors = [value.detach().reshape(()) for value in values if isinstance(value, Tensor)]
        numbers[torch.tensor(places, device=device)] = torch.stack([t.to(device, torch.float64) for t in tensors])
    return numbers
