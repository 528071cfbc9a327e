"""Status of every rank, all-gathered before gradients are reduced, so that a failed rank cannot hang the others.

Once a window; if the reduction overlaps the last micro-batch, before that micro-batch and after it.

RankVote, terms and parameters with a gradient → numbers → all-gather → VoteResult, the same on every rank
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

from torch import Tensor

from bigbatch.distributed.collective import Number, list_ranks
from bigbatch.distributed.gradient_sync import GradientSync
from bigbatch.errors import RankFailedError, TornUpdateError, WindowAbandonedError
from bigbatch.window_report import RanksReport

MAX_TERMS = 8
NUM_EXTRA = 3  # scalars of the noise observer
BITS = 48  # flags in one float64, which represents integers of 53 bits exactly
NO_EXTRA = (math.nan, 0.0, 0.0)  # not measured
UNKNOWN = -1


class Overlap(IntEnum):
    """Whether a rank reduces gradients within the last backward of a window.

    Attributes:
        NO: It does not, or before the last micro-batch, it cannot.
        YES: It does, or can.
        UNSUITED: It cannot: the parameters are others than those whose order is known.
        FAILED: It did and failed: the window is to be run again.
    """

    NO = 0
    YES = 1
    UNSUITED = 2
    FAILED = 3


@dataclass(frozen=True)
class RankVote:
    """The status of one rank at the end of a window, or before its last micro-batch if it may overlap.

    Attributes:
        failed: The window ended on this rank with an error.
        abandoned: The window is to be dropped.
        stopping: The run is to stop after this update.
        num_microbatches: Of the window, on this rank.
        tokens: Of the window on this rank, without padding; 0 if unknown.
        peak_bytes: Highest memory so far; 0 if the platform does not report it.
        elapsed_s: From the start of the window to its last gradient.
        num_steps: Updates that this rank has applied; `UNKNOWN` if other code counts them, or it failed before.
        overlap: Whether gradients were reduced within the last backward, or can be.
    """

    failed: bool = False
    abandoned: bool = False
    stopping: bool = False
    num_microbatches: int = 0
    tokens: int = 0
    peak_bytes: int = 0
    elapsed_s: float = 0.0
    num_steps: int = UNKNOWN
    overlap: Overlap = Overlap.NO


@dataclass(frozen=True)
class VoteResult:
    """The votes of all ranks.

    Attributes:
        votes: One for each rank.
        terms: Global ``(items, loss_sum)`` of each term, in the order of the sorted names.
        has_gradient: For each parameter, whether it received a gradient on any rank.
        extra: The scalars of the noise observer of each rank.
    """

    votes: tuple[RankVote, ...]
    terms: tuple[tuple[float, float], ...]
    has_gradient: tuple[bool, ...]
    extra: tuple[tuple[float, ...], ...] = ()

    @property
    def tokens(self) -> int:
        """Global tokens of the window, without padding."""
        return sum(vote.tokens for vote in self.votes)

    @property
    def has_items(self) -> bool:
        """Whether any term has items on any rank."""
        return any(items for items, _ in self.terms)

    @property
    def overlap(self) -> Overlap:
        """What all ranks do: YES if all do or can, else the reason that prevails."""
        found = {vote.overlap for vote in self.votes}
        return max(found) if len(found) == 1 or max(found) > Overlap.YES else Overlap.NO

    @property
    def peak_bytes(self) -> int:
        """Highest memory of any rank."""
        return max(vote.peak_bytes for vote in self.votes)

    def report(self) -> RanksReport:
        """Return what users see of the ranks."""
        times = [vote.elapsed_s for vote in self.votes]
        slowest = max(range(len(times)), key=times.__getitem__)
        return RanksReport(
            size=len(times),
            num_microbatches=tuple(vote.num_microbatches for vote in self.votes),
            slowest=slowest,
            slowest_share=1 - sum(times) / len(times) / times[slowest] if times[slowest] else 0.0,
            stopping=bool(self.ranks_with("stopping")),
            overlapped=self.overlap is Overlap.YES,
        )

    def check_succeeded(self, *, num_steps: int | None) -> None:
        """Raise on every rank if any did not finish its part of the window.

        Args:
            num_steps: Updates before the window; None if unknown.

        Raises:
            RankFailedError: A rank failed.
            TornUpdateError: An earlier update was applied on some ranks only.
            WindowAbandonedError: A rank abandoned the window.
        """
        self._check_same_updates()
        if failed := self.ranks_with("failed"):
            number = "" if num_steps is None else f" after update {num_steps}"
            raise RankFailedError(
                f"{list_ranks(failed)} failed in the window{number}, which changed nothing on any rank: see the error "
                "there. A window that ends without its step() has failed, too."
            )
        if abandoned := self.ranks_with("abandoned"):
            raise WindowAbandonedError(f"the window was abandoned on {list_ranks(abandoned)}.")

    def _check_same_updates(self) -> None:
        known = {rank: vote.num_steps for rank, vote in enumerate(self.votes) if vote.num_steps != UNKNOWN}
        if len(set(known.values())) > 1:
            most = max(known.values())
            ahead = list_ranks([rank for rank, number in known.items() if number == most])
            behind = list_ranks([rank for rank, number in known.items() if number < most])
            raise TornUpdateError(
                f"update {most} was applied on {ahead} and not on {behind}, where it failed after the gradients were "
                "reduced, so the parameters of the ranks differ. Return to a checkpoint on all ranks: "
                "load_state_dict() of the engine, or of the model, optimizer and scheduler with a new Accumulator."
            )

    def ranks_with(self, flag: str) -> list[int]:
        """Return the ranks whose vote has a flag."""
        return [rank for rank, vote in enumerate(self.votes) if getattr(vote, flag)]


def number_or_unknown(num_steps: int | None) -> int:
    """Return a number of updates as it is sent."""
    return UNKNOWN if num_steps is None else num_steps


def announce_failed_window(sync: GradientSync, num_parameters: int, num_steps: int | None) -> None:
    """Vote that the window failed on this rank; errors are ignored, since other ranks may have exited. Collective."""
    if sync.size > 1:
        with suppress(Exception):
            flags = [] if sync.is_sharded else [False] * num_parameters
            vote = RankVote(failed=True, num_steps=number_or_unknown(num_steps))
            sync.all_gather(to_numbers(vote, {}, flags))


def check_dense(parameters: Sequence[Tensor]) -> None:
    """Raise TypeError if a gradient is sparse: gradients are reduced over ranks as dense tensors."""
    if any(parameter.grad is not None and parameter.grad.is_sparse for parameter in parameters):
        raise TypeError(
            "a gradient is sparse, and gradients are reduced over ranks as dense tensors: use embeddings with "
            "sparse=False."
        )


def to_numbers(
    vote: RankVote,
    terms: Mapping[str, tuple[Number, Number]],
    has_gradient: Sequence[bool],
    extra: Sequence[Number] = NO_EXTRA,
) -> list[Number]:
    """Encode a vote as numbers; how many depends on the number of parameters only.

    Args:
        vote: Of this rank.
        terms: Local ``(items, loss_sum)`` by name.
        has_gradient: For each parameter, whether it received a gradient on this rank.
        extra: `NUM_EXTRA` scalars of the noise observer.

    Raises:
        ValueError: There are more than `MAX_TERMS` terms.
    """
    bits: list[Number] = []
    for start in range(0, len(has_gradient), BITS):
        bits.append(float(sum(1 << i for i, flag in enumerate(has_gradient[start : start + BITS]) if flag)))
    values: list[Number] = [getattr(vote, field.name) for field in fields(RankVote)]
    return [*values, *extra, *terms_to_numbers(terms), *bits]


def from_numbers(rows: Sequence[Sequence[float]], num_parameters: int) -> VoteResult:
    """Decode the votes of all ranks.

    Raises:
        ValueError: The ranks have different terms.
    """
    width = len(fields(RankVote))
    first_term = width + NUM_EXTRA
    end = first_term + 2 + 2 * MAX_TERMS
    votes = []
    for row in rows:
        kinds: list[Any] = [type(field.default) for field in fields(RankVote)]
        values: list[Any] = [kind(value) for kind, value in zip(kinds, row[:width], strict=True)]
        votes.append(RankVote(*values))
    has_gradient = tuple(
        any(int(row[end + i // BITS]) >> (i % BITS) & 1 for row in rows) for i in range(num_parameters)
    )
    terms = terms_from_numbers([row[first_term:end] for row in rows])
    return VoteResult(tuple(votes), terms, has_gradient, tuple(tuple(row[width:first_term]) for row in rows))


def terms_to_numbers(terms: Mapping[str, tuple[Number, Number]]) -> list[Number]:
    """Encode terms as numbers: how many, a checksum of their names, and two numbers for each, sorted by name.

    Raises:
        ValueError: There are more than `MAX_TERMS`.
    """
    if len(terms) > MAX_TERMS:
        raise ValueError(f"the loss has {len(terms)} terms, and at most {MAX_TERMS} are supported over several ranks.")
    checksum = zlib.crc32("\n".join(sorted(terms)).encode()) if terms else 0
    numbers: list[Number] = [float(len(terms)), float(checksum)]
    for name in sorted(terms):
        numbers += terms[name]
    return numbers + [0.0] * (2 + 2 * MAX_TERMS - len(numbers))


def terms_from_numbers(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    """Add up the terms of all ranks; a rank without terms adds nothing.

    Raises:
        ValueError: The ranks have different terms.
    """
    kinds = {(int(row[0]), int(row[1])) for row in rows if row[0]}
    if len(kinds) > 1:
        counts = ", ".join(f"rank {rank}: {int(row[0])}" for rank, row in enumerate(rows))
        raise ValueError(
            f"the ranks have different terms of the loss (number of terms on {counts}): return the same names on every "
            "rank."
        )
    if not kinds:
        return ()
    ((number, _),) = kinds
    places = range(2, 2 + 2 * number, 2)
    return tuple((math.fsum(row[i] for row in rows), math.fsum(row[i + 1] for row in rows)) for i in places)
