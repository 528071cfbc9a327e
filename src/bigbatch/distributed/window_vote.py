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

MOST_TERMS = 8
BITS = 48  # parameters told of in one float64, which holds 53 bits exactly

Number: TypeAlias = float | Tensor
"""A number, or a 0-d tensor on any device."""


@dataclass(frozen=True)
class Ballot:
    """What one rank brings besides its losses.

    Attributes:
        failed: It ended the window by an error of its own.
        gave_up: It was told to drop the window.
        stopping: It was told to stop after this update.
        num_microbatches: Of the window, on this rank.
        tokens: Of the window, on this rank, without padding; 0 where nobody counts.
        peak_bytes: Highest memory so far; 0 where the platform does not tell.
        elapsed_s: From the opening of the window until its gradients were there.
        samples: Behind the window, on this rank; 0 where nobody counts.
        squares: Sum of the squared norms of its micro-gradients; NaN where they were not measured.
        items_squared: Sum of the squared items of its micro-batches.
    """

    failed: bool = False
    gave_up: bool = False
    stopping: bool = False
    num_microbatches: int = 0
    tokens: int = 0
    peak_bytes: int = 0
    elapsed_s: float = 0.0
    samples: int = 0
    squares: Number = 0.0
    items_squared: Number = 0.0


@dataclass(frozen=True)
class Tally:
    """What all ranks brought.

    Attributes:
        ballots: One a rank, in their order.
        terms: ``(items, loss_sum)`` over all ranks, by the place of the term's name among the sorted names.
        reached: Which parameters received a gradient on any rank.
    """

    ballots: tuple[Ballot, ...]
    terms: tuple[tuple[float, float], ...]
    reached: tuple[bool, ...]

    def ranks_with(self, flag: str) -> list[int]:
        """Give the ranks whose ballot has a flag."""
        return [rank for rank, ballot in enumerate(self.ballots) if getattr(ballot, flag)]


def encode(ballot: Ballot, terms: Mapping[str, tuple[Number, Number]], reached: Sequence[bool]) -> list[Number]:
    """Write as numbers, of a count that depends on the number of parameters alone.

    Args:
        ballot: Of this rank.
        terms: ``(items, loss_sum)`` of this rank, by name.
        reached: Which parameters received a gradient here.

    Raises:
        ValueError: There are more terms than a ballot has room for.
    """
    bits: list[Number] = []
    for start in range(0, len(reached), BITS):
        bits.append(float(sum(1 << i for i, flag in enumerate(reached[start : start + BITS]) if flag)))
    values: list[Number] = [getattr(ballot, field.name) for field in fields(Ballot)]
    return [*values, *encode_terms(terms), *bits]


def decode(rows: Sequence[Sequence[float]], num_parameters: int) -> Tally:
    """Read what every rank wrote.

    Raises:
        ValueError: Ranks have other terms than one another.
    """
    width = len(fields(Ballot))
    end = width + 2 + 2 * MOST_TERMS
    ballots = []
    for row in rows:
        kinds: list[Any] = [type(field.default) for field in fields(Ballot)]
        told: list[Any] = [kind(value) for kind, value in zip(kinds, row[:width], strict=True)]
        ballots.append(Ballot(*told))
    reached = tuple(any(int(row[end + i // BITS]) >> (i % BITS) & 1 for row in rows) for i in range(num_parameters))
    return Tally(tuple(ballots), decode_terms([row[width:end] for row in rows]), reached)


def encode_terms(terms: Mapping[str, tuple[Number, Number]]) -> list[Number]:
    """Write terms as numbers: how many, a mark of their names, and two numbers for each, sorted by name.

    Raises:
        ValueError: There are more of them than there is room for.
    """
    if len(terms) > MOST_TERMS:
        raise ValueError(f"the loss has {len(terms)} terms, and ranks can agree about {MOST_TERMS} at most.")
    mark = zlib.crc32("\n".join(sorted(terms)).encode()) if terms else 0
    numbers: list[Number] = [float(len(terms)), float(mark)]
    for name in sorted(terms):
        numbers += terms[name]
    return numbers + [0.0] * (2 + 2 * MOST_TERMS - len(numbers))


def decode_terms(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
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
