"""What ranks do together: each its part, the first one concludes from all of them, and all go on or all raise.

    do() on every rank → outcomes to the first → conclude(outcomes) there → its share to every rank

A failure travels as a kind and a sentence, never as an exception with a traceback.
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
    "UntrustedError": IntegrityError,
    "CheckpointError": CheckpointError,
}
_Outcome = tuple[Any, "tuple[str, str] | None"]  # what was given, or the kind and the sentence of a failure


class RankGroup:
    """The ranks of a process group; without torch.distributed there is one.

    Args:
        group: The group, or None for all ranks. This rank is one of it.

    Attributes:
        rank: Of this process in the group.
        size: How many there are.

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
        """Do something on every rank, and go on with what the first rank concludes from it. Collective.

        Two messages a rank, however it ends. No rank raises before every rank knows.

        Args:
            do: Runs on every rank.
            on_first_rank: Runs on the first rank alone, with what each gave, and gives what each is to have.
            error_message: Runs on the first rank alone when any rank failed, with the reason as a clause that names the
                rank, and makes the sentence that all raise.

        Raises:
            TypeError, ValueError, UntrustedError, CheckpointError: A rank raised it; all raise it with its words.
            CheckpointError: A rank raised anything else; all raise the sentence of ``error_message``. The rank itself
                goes on raising what is no OSError.
            ConnectionError: Another rank is gone.
        """
        outcome, error = self._attempt(do)
        outcomes = self._gather(outcome)
        shares: list[_Outcome] = []
        if outcomes is not None:
            shares, own = self._conclude(outcomes, on_first_rank, error_message)
            error = error or own
        share, failure = self._scatter(shares)
        if failure is not None:
            if error is not None and not isinstance(error, (OSError, *_BY_KIND.values())):
                raise error
            kind, sentence = failure
            raise _BY_KIND.get(kind, CheckpointError)(sentence) from error
        given: R = share
        return given

    def _attempt(self, do: Callable[[], Any]) -> tuple[_Outcome, BaseException | None]:
        try:
            return (do(), None), None
        except BaseException as error:  # noqa: BLE001, the other ranks wait to hear of it; `confer` raises it
            return (None, self._described(error)), error

    def _described(self, error: BaseException) -> tuple[str, str]:
        for kind, raised in _BY_KIND.items():
            if isinstance(error, raised):
                return kind, str(error)
        reason = os_reason(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        return "", reason if self.size == 1 else f"rank {self.rank}: {reason}"

    def _conclude(
        self, outcomes: list[_Outcome], conclude: Callable[[list[Any]], list[Any]], give_up: Callable[[str], str]
    ) -> tuple[list[_Outcome], BaseException | None]:
        failure, error = next((failure for _, failure in outcomes if failure is not None), None), None
        if failure is None:
            (shares, failure), error = self._attempt(lambda: conclude([given for given, _ in outcomes]))
            if failure is None:
                return [(share, None) for share in shares], None
        kind, reason = failure
        sentence = give_up(reason)
        return [(None, (kind, reason if kind else sentence))] * self.size, error

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
    except RuntimeError as error:  # of whatever kind the backend has for a peer that is gone
        raise ConnectionError("another rank cannot be reached") from error
