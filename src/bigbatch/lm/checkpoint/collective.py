"""Collective operations with a decision: every rank does its part, the first rank decides, all return or all raise.

    do() on every rank → outcomes gathered on the first → on_first_rank(outcomes) → a result scattered to every rank

A failure is sent as the name of its class and its message, never as a pickled exception with a traceback.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from bigbatch.errors import CheckpointError
from bigbatch.lm.checkpoint.integrity import IntegrityError
from bigbatch.lm.files import os_reason

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
R = TypeVar("R")

_BY_KIND: dict[str, type[Exception]] = {
    "TypeError": TypeError,
    "ValueError": ValueError,
    "IntegrityError": IntegrityError,
    "CheckpointError": CheckpointError,
}
_Outcome = tuple[Any, "tuple[str, str] | None"]  # the result, or the class and the message of a failure


class RankGroup:
    """The ranks of a process group; a single one without torch.distributed.

    Args:
        group: The group, or None for all ranks. This rank is a member.

    Attributes:
        rank: Rank of this process in the group.
        size: Number of ranks.

    Raises:
        ValueError: This process is not in the group.
    """

    def __init__(self, group: "ProcessGroup | None" = None) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if several else 0
        self.size = dist.get_world_size(group) if several else 1
        self._group = group
        if self.rank < 0:
            raise ValueError("this rank is not in the group: only the ranks of a group write or read with it.")

    def run_together(
        self,
        do: Callable[[], T],
        on_first_rank: Callable[[list[T]], list[R]],
        error_message: Callable[[str], str],
    ) -> R:
        """Run a function on every rank and return what the first rank makes of the results. Collective.

        Two messages per rank, with or without an error. No rank raises before every rank knows of the failure.

        Args:
            do: Runs on every rank.
            on_first_rank: Runs on the first rank only, with the results of all ranks; returns one value per rank.
            error_message: Runs on the first rank only, if any rank failed, with the reason as a clause that names the
                rank; returns the message that all ranks raise.

        Raises:
            TypeError, ValueError, IntegrityError, CheckpointError: A rank raised it; all raise it with its message.
            CheckpointError: A rank raised anything else; all raise the message of ``error_message``. The rank itself
                re-raises its own error unless that is an OSError.
            ConnectionError: Another rank cannot be reached.
        """
        outcome, error = self._attempt(do)
        outcomes = self._gather(outcome)
        shares: list[_Outcome] = []
        if outcomes is not None:
            shares, own = self._decide(outcomes, on_first_rank, error_message)
            error = error or own
        share, failure = self._scatter(shares)
        if failure is not None:
            if error is not None and not isinstance(error, (OSError, *_BY_KIND.values())):
                raise error
            kind, message = failure
            raise _BY_KIND.get(kind, CheckpointError)(message) from error
        result: R = share
        return result

    def _attempt(self, do: Callable[[], Any]) -> tuple[_Outcome, BaseException | None]:
        try:
            return (do(), None), None
        except BaseException as error:  # noqa: BLE001, the other ranks wait for it; `run_together` raises it
            return (None, self._describe(error)), error

    def _describe(self, error: BaseException) -> tuple[str, str]:
        for kind, raised in _BY_KIND.items():
            if isinstance(error, raised):
                return kind, str(error)
        reason = os_reason(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        return "", reason if self.size == 1 else f"rank {self.rank}: {reason}"

    def _decide(
        self,
        outcomes: list[_Outcome],
        on_first_rank: Callable[[list[Any]], list[Any]],
        error_message: Callable[[str], str],
    ) -> tuple[list[_Outcome], BaseException | None]:
        failure, error = next((failure for _, failure in outcomes if failure is not None), None), None
        if failure is None:
            (shares, failure), error = self._attempt(lambda: on_first_rank([result for result, _ in outcomes]))
            if failure is None:
                return [(share, None) for share in shares], None
        kind, reason = failure
        message = error_message(reason)
        return [(None, (kind, reason if kind else message))] * self.size, error

    def _gather(self, outcome: _Outcome) -> list[_Outcome] | None:
        if self.size == 1:
            return [outcome]
        outcomes: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with _connected():
            dist.gather_object(outcome, outcomes, group=self._group, group_dst=0)
        return outcomes

    def _scatter(self, shares: list[_Outcome]) -> _Outcome:
        if self.size == 1:
            return shares[0]
        share: list[Any] = [None]
        with _connected():
            dist.scatter_object_list(share, shares or None, group=self._group, group_src=0)
        received: _Outcome = share[0]
        return received


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # each backend has its own for a lost peer
        raise ConnectionError("another rank cannot be reached") from error
