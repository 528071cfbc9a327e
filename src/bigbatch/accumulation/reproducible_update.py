"""The pending update of a window whose result is the same bits for any order, any cut and any number of ranks.

micro-batches → magnitudes and counts of all ranks → do the scales suit them? ─no──▶ other scales, run them again
                                                      └─yes──▶ vote, integer reduction → float32 → division
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from bigbatch.accumulation.optimizer_update import OptimizerUpdate
from bigbatch.accumulation.pending_update import PendingUpdate
from bigbatch.accumulation.reproducible_state import ReproducibleState
from bigbatch.accumulation.window_content import WindowContent
from bigbatch.batching.split import BatchWrites
from bigbatch.distributed import window_vote
from bigbatch.distributed.gradient_sync import GradientSync, Microbatch, never
from bigbatch.errors import WindowStateError
from bigbatch.gradients.exact_totals import ExactTotals
from bigbatch.gradients.fixed_point_sums import FixedPointSums
from bigbatch.gradients.gradient_scales import Magnitudes
from bigbatch.window_report import WindowReport

MAX_PASSES = 3  # the second has the scales that the first one needed; a user's own dropout may need a third
NO_SECOND_PASS = (
    "the gradients of this window have other magnitudes than those of the windows before, and its micro-batches cannot "
    "be run again from here: run them in a new window, whose scales suit them, or iterate over a window of "
    "accumulator.windows(...) or accumulator.window(microbatches), which then yields them once more."
)

WRITTEN = (
    "the gradients of this window have other magnitudes than those of the windows before, and its micro-batches cannot "
    "be run again, because they were written to in place: make new tensors in the loop, such as x = x / 255 in place "
    "of x.div_(255), and let the loader yield new ones."
)


class ReproducibleUpdate(PendingUpdate):
    """A window with fixed-point gradient sums and exact totals.

    Args:
        update: As for `PendingUpdate`.
        sync: As for `PendingUpdate`; replicated, or of a single process.
        content: As for `PendingUpdate`.
        state: Its scales are used, and then those of this window are noted.
        should_stop: As for `PendingUpdate`.
    """

    def __init__(
        self,
        update: OptimizerUpdate,
        sync: GradientSync,
        content: WindowContent,
        state: ReproducibleState,
        *,
        should_stop: Callable[[], bool] = never,
    ) -> None:
        super().__init__(update, sync, content, should_stop=should_stop)
        self.sums.close()
        self._reproducible = state
        parameters = self.sums.parameters
        scales = state.scales.scales(len(parameters)) or [0] * len(parameters)  # 0: finds the magnitudes
        self.sums: FixedPointSums = FixedPointSums(parameters, scales=scales)
        self.sums.open()
        self.loss_totals: ExactTotals = ExactTotals(content.totals)
        self._passes = 0
        self._has_other_microbatches = False  # than those that are iterated over
        self._drawn: list[Any] = []  # micro-batches that were drawn lazily
        self._writes: list[BatchWrites] = []  # to the micro-batches
        self._magnitudes: Magnitudes | None = None  # of all ranks, once they suit the scales
        self._peaks: list[float] = []

    def restart(self) -> None:
        """Drop the micro-batches so far, to run them again."""
        super().restart()
        self.loss_totals = ExactTotals(self._content.totals)

    def microbatches(
        self, should_abandon: Callable[[], bool] = never, again: Sequence[Any] = ()
    ) -> Iterator[Microbatch]:
        """Yield this rank's micro-batches, once for each pass; arguments as for `PendingUpdate.microbatches`."""
        if isinstance(self._content.microbatches, Sequence):
            source = super().microbatches(should_abandon, again)
            if not self._passes:
                self._writes = list(map(BatchWrites, self._content.microbatches))
        else:
            source = map(Microbatch, self._drawn) if self._passes else self._drawing()
        return source if self._passes else self._noting_start(source)

    def _drawing(self) -> Iterator[Microbatch]:
        for content in self._content.microbatches:
            self._drawn.append(content)
            self._writes.append(BatchWrites(content))
            yield Microbatch(content)

    def _noting_start(self, source: Iterator[Microbatch]) -> Iterator[Microbatch]:
        self._has_other_microbatches = self.num_microbatches > 0
        yield from source

    def end_pass(self, *, can_run_again: bool = True) -> bool:
        """Return whether the sums of this pass are exact; if not, it is dropped, and must be run again. Collective.

        Args:
            can_run_again: Whether this rank will run its micro-batches again if that is needed.

        Raises:
            RankFailedError: Another rank failed in this window.
            WindowAbandonedError: A rank abandoned it.
            WindowStateError: The pass must be run again, and a rank cannot.
        """
        if self._magnitudes is not None:
            return True
        self._passes += 1
        were_written = any(each.found for each in self._writes)
        can_run_again = can_run_again and not (self._has_other_microbatches or were_written)
        if self._sync.size > 1:
            self._check_ranks_succeeded()
        own = [*self.sums.peaks(), self.loss_totals.num_recorded, float(can_run_again)]
        rows = self._sync.all_gather(own)
        *peaks, _, _ = (_largest(column) for column in zip(*rows, strict=True))
        num_quanta = int(sum(row[-2] for row in rows))
        is_finite = all(map(math.isfinite, peaks))
        found = Magnitudes.from_peaks(peaks if is_finite else [0.0] * len(peaks), num_quanta)
        if found.suit(self.sums.scales):
            self._magnitudes, self._peaks = found, peaks
            return True
        if not all(row[-1] for row in rows):
            self._reproducible.scales.note(found)
            raise WindowStateError(WRITTEN if were_written else NO_SECOND_PASS)
        if self._passes == MAX_PASSES:
            raise WindowStateError(
                f"the gradients of this window had other magnitudes in each of {MAX_PASSES} passes over the same "
                "micro-batches: seed what is random in the loop by the micro-batch."
            )
        self.sums.set_scales(found.scales())
        self.restart()
        return False

    def _check_ranks_succeeded(self) -> None:
        vote = window_vote.RankVote(abandoned=self._is_abandoned)
        num_parameters = len(self.sums.parameters)
        self._has_voted = True
        rows = self._sync.all_gather(window_vote.to_numbers(vote, {}, [False] * num_parameters))
        result = window_vote.from_numbers(rows, num_parameters)
        result.check_succeeded(num_steps=self._update.known_num_steps)
        self._has_voted = False  # the next vote is that of another pass, or of the end of the window

    def apply(self, *, retries: int = 0, run_again: "Callable[[PendingUpdate], None] | None" = None) -> WindowReport:
        """Update once, as `PendingUpdate.apply`; optimizers that need a closure are not supported."""
        return super().apply(retries=retries)

    def _settle(self, retries: int) -> tuple[Any, window_vote.VoteResult | None, list[Tensor]]:
        self._require_open()
        while not self.end_pass(can_run_again=not self.loss_totals.num_recorded):
            pass  # this rank has no micro-batch
        assert self._magnitudes is not None, "else another pass follows"
        extra: tuple[Any, window_vote.VoteResult | None, list[Tensor]] = super()._settle(retries)
        shares = self.loss_totals.shares()
        self.loss_totals.set_shares([shares] if self._sync.size == 1 else self._sync.ranks.all_gather(shares))
        self.sums.to_float32(self._peaks)
        self._reproducible.scales.note(self._magnitudes)
        self._reproducible.end_window()
        return extra


def _largest(values: tuple[float, ...]) -> float:
    """Return the largest number, NaN if any is."""
    return math.nan if any(map(math.isnan, values)) else max(values)
