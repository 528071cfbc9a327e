"""Meetings of ranks at a batch norm, so that its statistics are those of the global batch.

where each rank is, as numbers → all the same, or all at the end → all-gather of float64 [2, channels] → combined

Every exchange begins with the same message, so that a rank that failed, or has no samples, can answer whichever norm
the others wait in.
"""

import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from bigbatch.batch_norm.moments import Moments
from bigbatch.batch_norm.norm_calls import Meeting
from bigbatch.distributed.collective import DistributedRankGroup, list_ranks
from bigbatch.errors import InputError, RankFailedError


class _Status(IntEnum):
    ENDED = 0
    WAITS = 1
    HAS_NO_SAMPLES = 2
    OUT_OF_MEMORY = 3
    FAILED = 4


@dataclass(frozen=True)
class RankMeeting:
    """A norm at which all ranks with samples wait.

    Attributes:
        key: As `key_of` its name.
        is_backward: As for `Meeting`.
        joint: Moments of the global batch, or sums of gradients.
        momentum: As for `Meeting`.
        is_tracked: Whether it has running statistics.
    """

    key: int
    is_backward: bool
    joint: Moments
    momentum: float
    is_tracked: bool


class RanksOutOfMemoryError(Exception):
    """Memory ran out on some ranks: all of them start the window again."""


def key_of(norm: str) -> int:
    """Return the number by which ranks compare norms."""
    return zlib.crc32(norm.encode())


@dataclass(frozen=True)
class RankMeetings:
    """The messages of one rank in a window.

    Args:
        ranks: All of them run the window.
        device: Of the model.
    """

    ranks: DistributedRankGroup
    device: torch.device

    def announce_failure(self) -> None:
        """Report to the ranks in `meet` that this one failed; errors are ignored. Collective."""
        with suppress(Exception):
            self._send([_Status.FAILED])

    def announce_out_of_memory(self) -> None:
        """Report to the ranks in `meet` that the window starts again. Collective."""
        with suppress(RanksOutOfMemoryError):
            self._statuses(self._send([_Status.OUT_OF_MEMORY]))

    def meet(self, own: Meeting | None, *, has_samples: bool) -> RankMeeting | None:
        """Return what all ranks wait for, with the result; None if they are at the end. Collective.

        Args:
            own: What this rank waits for; None at the end.
            has_samples: Whether it has any; else it joins the others.

        Raises:
            InputError: Ranks wait for different norms.
            RankFailedError: Another rank failed.
            RanksOutOfMemoryError: Memory ran out on another rank.
        """
        if own is None:
            rows = self._send([_Status.ENDED if has_samples else _Status.HAS_NO_SAMPLES])
        else:
            tracked = own.running != (None, None)
            form = [own.is_backward, own.own.values.shape[1], own.own.count, own.momentum, tracked]
            rows = self._send([_Status.WAITS, key_of(own.norm), *form])
        statuses = self._statuses(rows)
        waiting = [row for row, status in zip(rows, statuses, strict=True) if status is _Status.WAITS]
        if not waiting:
            return None
        _check_same(rows, statuses, own)
        _, key, is_backward, channels, _, momentum, is_tracked = waiting[0]
        counts = [int(row[4]) if status is _Status.WAITS else 0 for row, status in zip(rows, statuses, strict=True)]
        parts = self._gather(own, counts, int(channels))
        joint = parts[0] if is_backward else Moments.combined([part for part in parts if part.count] or parts)
        if is_backward:
            joint = Moments(parts[0].count, torch.stack([part.values for part in parts]).sum(0))
        return RankMeeting(int(key), bool(is_backward), joint, momentum, bool(is_tracked))

    def _send(self, values: Sequence[float]) -> list[list[float]]:
        return self.ranks.all_gather_numbers([*map(float, values), *[0.0] * (7 - len(values))])

    def _statuses(self, rows: Sequence[Sequence[float]]) -> list[_Status]:
        statuses = [_Status(int(row[0])) for row in rows]
        if failed := _ranks_with(_Status.FAILED, statuses):
            raise RankFailedError(
                f"{list_ranks(failed)} failed in the window, which therefore changes nothing on any rank: see the "
                "error there."
            )
        if short := _ranks_with(_Status.OUT_OF_MEMORY, statuses):
            raise RanksOutOfMemoryError(f"out of memory on {list_ranks(short)}")
        return statuses

    def _gather(self, own: Meeting | None, counts: Sequence[int], channels: int) -> list[Moments]:
        sent = torch.zeros(2, channels, dtype=torch.float64, device=self.ranks.device)
        if own is not None:
            sent.copy_(own.own.values)
        received = [torch.empty_like(sent) for _ in counts]
        dist.all_gather(received, sent, group=self.ranks.group)
        dtype = torch.float64 if own is None else own.own.values.dtype
        values: Any = torch.stack(received).to(self.device)
        if dtype is not torch.float64:
            values = values.to(dtype)
        return [Moments(count, part) for count, part in zip(counts, values, strict=True)]


def _ranks_with(wanted: _Status, statuses: Sequence[_Status]) -> list[int]:
    return [rank for rank, status in enumerate(statuses) if status is wanted]


def _check_same(rows: Sequence[Sequence[float]], statuses: Sequence[_Status], own: Meeting | None) -> None:
    """Raise unless all ranks with samples wait for the same norm."""
    places = {
        tuple(row[:4]): rank
        for rank, (row, status) in reversed(list(enumerate(zip(rows, statuses, strict=True))))
        if status is not _Status.HAS_NO_SAMPLES
    }
    if len(places) > 1:
        first, other, *_ = sorted(places.values())
        here = "at the end" if own is None else f"at {own}"
        raise InputError(
            f"ranks {first} and {other} do not reach the same batch norms in the same order (this rank is {here}): "
            'batch_norm="exact" needs every rank to run the same ones. Take branches that depend on the data out of '
            "the model, or leave batch_norm= out."
        )
