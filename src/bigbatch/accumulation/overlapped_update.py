"""The pending update of a window whose sums are reduced over ranks while its last backward runs.

micro-batches → vote: can all ranks overlap? ─yes──▶ last micro-batch, buckets → vote: did any rank fail? ─no──▶ update
                  └─no──▶ as `PendingUpdate`                                        └─yes──▶ the window again, without

No rank changes anything before all have voted that nobody failed, as in other windows.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from bigbatch.accumulation.noise_observer import NoiseObserver
from bigbatch.accumulation.optimizer_update import OptimizerUpdate
from bigbatch.accumulation.pending_update import PendingUpdate
from bigbatch.accumulation.window_content import WindowContent
from bigbatch.distributed import window_vote
from bigbatch.distributed.collective import Number
from bigbatch.distributed.gradient_sync import GradientSync, never
from bigbatch.distributed.overlapped_reduction import OverlappedReduction
from bigbatch.distributed.replicated import Replicated
from bigbatch.distributed.window_vote import Overlap
from bigbatch.gradients.foreign_writes import WindowHook, on_accumulated
from bigbatch.window_report import WindowReport


def can_overlap(update: OptimizerUpdate, sync: GradientSync) -> bool:
    """Return whether windows may overlap: not if their sums are in host memory."""
    return sync.overlap is not None and update.offload is None


class OverlappedUpdate(PendingUpdate):
    """A window whose last micro-batch may overlap the reduction; until that is chosen, it learns what is needed for it.

        for microbatch in all but the last:
            pending.add(...)
        if pending.vote_before_last(run_again):     # else the last one is run as the others, and reduced later
            pending.add(last)
            pending.finish_reduction()              # or, if anything failed: pending.fail_reduction()
        pending.apply()                             # may call run_again

    Args:
        update: As for `PendingUpdate`.
        sync: Of several ranks.
        content: As for `PendingUpdate`, with a list of micro-batches.
        static_buffers: As for `PendingUpdate`.
        observer: As for `PendingUpdate`.
        should_stop: As for `PendingUpdate`; called again if the window is run again.

    Attributes:
        has_voted_before_last: Whether `vote_before_last` was called.
    """

    def __init__(
        self,
        update: OptimizerUpdate,
        sync: GradientSync,
        content: WindowContent,
        *,
        static_buffers: Mapping[Tensor, Tensor] | None = None,
        observer: NoiseObserver | None = None,
        should_stop: Callable[[], bool] = never,
    ) -> None:
        super().__init__(
            update, sync, content, static_buffers=static_buffers, observer=observer, should_stop=should_stop
        )
        assert isinstance(sync, Replicated), "others do not overlap"
        assert sync.overlap is not None, "else no window overlaps"
        self._replicated, self._choice = sync, sync.overlap
        self.has_voted_before_last = False
        self._reduction: OverlappedReduction | None = None
        self._run_again: Callable[[PendingUpdate], int] | None = None
        self._num_retries = 0  # of the second run
        self._completed: dict[Tensor, None] | None = None  # in their order, if this window is to show it
        self._handles: list[RemovableHandle] = []

    @property
    def num_planned(self) -> int:
        """Micro-batches of this rank."""
        microbatches = self._content.microbatches
        assert isinstance(microbatches, Sequence), "those of an engine"
        return len(microbatches)

    @property
    def may_run_again(self) -> bool:
        """Whether the window may be run again from its start, whose state must then be saved."""
        return self._choice.is_on

    def vote_before_last(self, run_again: Callable[[PendingUpdate], int], *, can_run_again: bool = True) -> bool:
        """Return whether the last micro-batch of this rank, if it has one, is to overlap. Collective if that may be.

        Args:
            run_again: Restores the state of the start of the window, runs all its micro-batches again, and returns how
                many attempts ran out of memory.
            can_run_again: Whether this rank can do so.

        Raises:
            RankFailedError: Another rank failed in this window.
            WindowAbandonedError: A rank abandoned it.
        """
        self.has_voted_before_last = True
        if not self._choice.is_on:
            self._watch()
            return False
        own = self._own_overlap() if can_run_again else Overlap.NO
        reduction = self._replicated.overlapped_reduction(self.sums) if own is Overlap.YES else None
        if self._agree(own) is not Overlap.YES or reduction is None:
            return False
        self._reduction, self._overlap, self._run_again = reduction, Overlap.YES, run_again
        reduction.begin()
        return True

    def _watch(self) -> None:
        """Note the order in which gradients are complete, if it is needed."""
        if not self._choice.is_learning:
            return
        self._completed = {}
        if not self._sync.rank:
            trained = [parameter for parameter in self.sums.parameters if parameter.requires_grad]
            self._handles = [on_accumulated(parameter, WindowHook(self._note, parameter)) for parameter in trained]

    def _note(self, parameter: Tensor) -> None:
        if self._completed is not None:
            self._completed[parameter] = None

    def _agree(self, own: Overlap) -> Overlap:
        """Exchange whether ranks have failed, and whether they can overlap. Collective."""
        vote = window_vote.RankVote(
            abandoned=self._is_abandoned,
            num_steps=window_vote.number_or_unknown(self._update.known_num_steps),
            overlap=own,
        )
        num_parameters = len(self.sums.parameters)
        numbers = window_vote.to_numbers(vote, {}, [False] * num_parameters)
        self._has_voted = True
        with self._beside_device_work():
            rows = self._sync.all_gather(numbers)
        result = window_vote.from_numbers(rows, num_parameters)
        result.check_succeeded(num_steps=self._update.known_num_steps)
        self._has_voted = False  # the next vote is that of the end of the window
        if result.overlap is Overlap.UNSUITED:
            self._choice.forget()
        return result.overlap

    def _own_overlap(self) -> Overlap:
        if not self._choice.suits(self.sums.parameters):
            return Overlap.UNSUITED
        return Overlap.YES if self.sums.can_name_leaves and not self._prescales else Overlap.NO

    def _beside_device_work(self) -> AbstractContextManager[Any]:
        """Let a message of the host not wait for the micro-batches that are queued on the device."""
        if self._device.type != "cuda":
            return nullcontext()
        return torch.cuda.stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]

    def finish_reduction(self) -> None:
        """Send what is left, and wait for all buckets."""
        assert self._reduction is not None, "the ranks agreed to overlap"
        self._reduction.finish()

    def fail_reduction(self) -> None:
        """Send NaN for what is left, and let all ranks run the window again."""
        assert self._reduction is not None, "the ranks agreed to overlap"
        self._overlap = Overlap.FAILED
        self.sums.clear()
        self._reduction.send_nan()

    def discard(self) -> None:
        """Drop sums and gradients, as `PendingUpdate.discard`; the other ranks may wait for buckets, too."""
        WindowHook.remove(self._handles)
        if self.is_open and not self._has_voted and self._reduction is not None:
            with suppress(Exception):  # the other ranks may have exited
                self._reduction.send_nan()
        super().discard()

    def _vote(self, extra: Sequence[Number]) -> window_vote.VoteResult:
        WindowHook.remove(self._handles)
        result = super()._vote(extra)
        if result.overlap is not Overlap.FAILED:
            return result
        result.check_succeeded(num_steps=self._update.known_num_steps)
        self._choice.rest()
        self._reduction, self._overlap, self._has_voted = None, Overlap.NO, False
        if self._observer is not None:
            self._observer.skip_window()
        self.restart()
        assert self._run_again is not None, "the ranks agreed to overlap"
        self._num_retries = self._run_again(self)
        return super()._vote(window_vote.NO_EXTRA)

    def _reduce(self, result: window_vote.VoteResult) -> None:
        result.check_succeeded(num_steps=self._update.known_num_steps)
        self._choice.end_window(self._sync.ranks, self.sums.parameters, self._completed)
        if self._reduction is None:
            self._reduce_measured(result)
            return
        self.loss_totals.set_global_totals(result.terms)
        self._reduction.store(result.has_gradient)
        self._replicated.end_reduction(self.sums)
        self._num_syncs += 1

    def _reduce_measured(self, result: window_vote.VoteResult) -> None:
        started_s = time.perf_counter()
        super()._reduce(result)
        if self._choice.measures:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            ended_s = time.perf_counter()
            self._choice.note(ended_s - started_s, ended_s - self._started_s)

    def _report(self, *arguments: Any, retries: int) -> WindowReport:
        return super()._report(*arguments, retries=retries + self._num_retries)
