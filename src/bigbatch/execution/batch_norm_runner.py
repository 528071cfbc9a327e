"""Run windows whose batch norms normalize by the whole batch.

    run: note the micro-batch
    end: all forwards and backwards, in turns that meet at each norm

If memory runs out, the window starts again on all ranks, with halves of the micro-batches of that rank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from bigbatch.accumulation.pending_update import PendingUpdate
from bigbatch.batch_norm.checks import check_modules
from bigbatch.batch_norm.joint_window import JointWindow, OutOfMemory
from bigbatch.batch_norm.rank_meetings import RankMeetings
from bigbatch.distributed.collective import DistributedRankGroup
from bigbatch.distributed.gradient_sync import GradientSync, Microbatch, never
from bigbatch.execution.oom_retry import halves, too_large
from bigbatch.execution.runner import MicrobatchRunner, WindowInputs
from bigbatch.gradients.leaf_backward import backward_inside
from bigbatch.memory.usage import free_cached_memory
from bigbatch.trials.loss_modules import modules_used_by
from bigbatch.types import LossFunction

Rows = Sequence[int]


class BatchNormRunner(MicrobatchRunner):
    """Runs windows with ``batch_norm="exact"``.

    Args:
        loss_fn: Of the engine; its modules are searched for batch norms, too.
        sync: Of the model.
        device: Of its first parameter.
    """

    def __init__(self, loss_fn: LossFunction, sync: GradientSync, device: torch.device) -> None:
        super().__init__(sync.model)
        self._sync = sync
        self._loss_fn = loss_fn
        self._modules = [sync.module, *modules_used_by(loss_fn)]
        ranks = RankMeetings(sync.ranks, device) if isinstance(sync.ranks, DistributedRankGroup) else None
        self.waits_for_ranks = ranks is not None
        self._joint = JointWindow(self._modules, device, ranks)
        self._groups: list[Rows] = []
        self.prepare()

    def prepare(self) -> None:
        """Prepare for a window, before it opens.

        Raises:
            InputError: A module is compiled, or normalizes over other ranks.
        """
        self.retries = 0
        check_modules([self._model, *self._modules[1:]], self._loss_fn, num_ranks=self._sync.size)

    @contextmanager
    def window(self, inputs: WindowInputs) -> Iterator[None]:
        """Run one window; if it fails, running statistics are put back, and the other ranks fail, too."""
        self._groups = []
        with self._joint.open(), super().window(inputs):
            yield

    def run(self, microbatch: Microbatch, pending: PendingUpdate) -> None:
        """Note one micro-batch, which runs in `end`."""
        self._groups.append(microbatch.content)

    def end(self, pending: PendingUpdate, should_abandon: Callable[[], bool] = never) -> None:
        """Run all micro-batches.

        Raises:
            InputError: Micro-batches, or ranks, do not run the same batch norms in the same order.
            MemoryLimitError: Memory ran out with single samples.
            RankFailedError: Another rank failed.
            WindowAbandonedError: ``should_abandon`` returned True, in a single process.
        """
        groups, self._groups = self._groups, []
        while (failure := self._run_window(groups, pending, should_abandon)) is not None:
            if failure.is_here:
                self.retries += 1
                groups = self._smaller(groups, failure.message)
            pending.restart()
            free_cached_memory()

    def _smaller(self, groups: Sequence[Rows], message: str) -> list[Rows]:
        """Cut micro-batches into halves, but for those that are as small already."""
        largest = max(map(len, groups))
        if largest == 1:
            raise too_large(groups[0][0], message, self.inputs.lengths)
        return [half for rows in groups for half in (halves(rows) if 2 * len(rows) > largest else [rows])]

    def _run_window(
        self, groups: list[Rows], pending: PendingUpdate, should_abandon: Callable[[], bool]
    ) -> OutOfMemory | None:
        turns = pending.microbatches(should_abandon, again=groups) if groups else ()
        with pending.sums.adding() as trained:
            return self._joint.run(partial(self._differentiate, turn.content, pending, trained) for turn in turns)

    def _differentiate(self, rows: Rows, pending: PendingUpdate, trained: Sequence[Tensor]) -> None:
        """Run forward and backward of a micro-batch, in a thread of its own."""
        microbatch = self.inputs.take(rows)
        self._joint.note_inputs(microbatch)
        loss = pending.record(self.inputs.loss_fn(self._model, microbatch))
        if loss is not None:
            backward_inside(loss, pending.sums, trained)

    def release(self) -> None:
        """End threads that wait for the next window."""
        self._joint.stop()
