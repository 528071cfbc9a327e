"""Run the last micro-batch of a window while the gradients of the ranks are reduced.

save the state → micro-batches → all ranks vote → the last one, whose backward sends buckets → end of the window
  └─────────◀── restore, all micro-batches again, if any rank failed in the last one ◀──────────┘
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigbatch.accumulation.overlapped_update import OverlappedUpdate
from bigbatch.accumulation.pending_update import PendingUpdate
from bigbatch.distributed.gradient_sync import Microbatch, never
from bigbatch.errors import WindowStateError, first_line
from bigbatch.execution.oom_retry import OomRetry
from bigbatch.execution.runner import WRITE_TO_COPY
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory
from bigbatch.rng import random_states, set_random_states


class _Start(NamedTuple):
    """What micro-batches may change, as it was at the start of a window."""

    random_states: dict[str, Any]
    buffers: list[tuple[Tensor, Tensor]]


class OverlapRunner(OomRetry):
    """Runs micro-batches as `OomRetry`; the last one of a window that overlaps once, and the window again if it fails.

    Random states of this process and buffers of the model are then those of the start of the window. What else a loss
    changes is not restored.
    """

    overlaps = True
    _failure = ""  # of the last micro-batch, if memory did not run out

    def run_all(self, pending: PendingUpdate, should_abandon: Callable[[], bool] = never) -> None:
        """Run all micro-batches of the window."""
        if not isinstance(pending, OverlappedUpdate):
            super().run_all(pending, should_abandon)
            return
        start = None
        if pending.may_run_again:
            buffers = [(buffer, buffer.detach().clone()) for buffer in self._buffers]
            start = _Start(random_states([self._device]), buffers)
        run_again = partial(self._run_again, should_abandon, start)
        for number, microbatch in enumerate(pending.microbatches(should_abandon), 1):
            is_last = number == pending.num_planned
            if is_last and pending.vote_before_last(run_again, can_run_again=not self.inputs.were_written):
                self._run_last(microbatch, pending)
            else:
                self.run(microbatch, pending)
        if not pending.has_voted_before_last and pending.vote_before_last(run_again):
            self._run_last(None, pending)  # this rank has no micro-batch
        self.end(pending, should_abandon)

    def _run_last(self, microbatch: Microbatch | None, pending: OverlappedUpdate) -> None:
        """Add the gradient of a micro-batch and reduce the sums; if that fails, let all ranks run the window again."""
        self._failure = ""
        try:
            if microbatch is not None:
                pending.add(self.inputs.loss_fn(self._model, self.inputs.take(microbatch.content)))
            pending.finish_reduction()
            return
        except Exception as error:  # noqa: BLE001 - raised again by the second run, unless it succeeds
            out_of_memory = is_out_of_memory(error)
            self._failure = "" if out_of_memory else f"{type(error).__name__}: {first_line(error)}"
        # Outside the except block: inside it, the traceback holds the tensors of the attempt.
        if out_of_memory:
            self.retries += 1
            free_cached_memory()
        pending.fail_reduction()

    def _run_again(self, should_abandon: Callable[[], bool], start: _Start | None, pending: PendingUpdate) -> int:
        """Run the window from its start, without overlap; return how many attempts ran out of memory.

        Raises:
            WindowStateError: The loss has written to the batch.
        """
        if self.inputs.were_written:
            raise WindowStateError(
                "a rank failed in the last micro-batch of a window, and the window cannot be run again, because "
                f"loss_fn has written to its micro-batches in place: {WRITE_TO_COPY}"
            )
        if self._failure:
            warnings.warn(
                f"the last micro-batch of a window failed ({self._failure}) while gradients were reduced over ranks. "
                "All ranks have dropped the window, and run it again without overlap.",
                stacklevel=6,  # the call of Engine.step
            )
        assert start is not None, "saved in each window that may overlap"
        set_random_states(start.random_states, [self._device])
        with torch.no_grad():
            for buffer, copy in start.buffers:
                buffer.copy_(copy)
        before = self.retries
        super().run_all(pending, should_abandon)
        return self.retries - before
