"""One micro-batch among those that take turns, and the place where all of them wait."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from bigbatch.batch_norm.host_tensors import HostTensors
from bigbatch.batch_norm.made_tensors import TensorsOfOne, used_by_other
from bigbatch.batch_norm.moments import Moments
from bigbatch.batch_norm.norm_calls import Meeting, NormCalls
from bigbatch.batch_norm.suspension import Task, Worker
from bigbatch.batch_norm.thread_state import ThreadState
from bigbatch.errors import InputError


class Turn:
    """One micro-batch: its thread, its calls of norms, its random numbers, and what it waits for.

    Args:
        function: Runs its forward and backward.
        worker: Of its thread.
        state: Of the thread that calls `advance`.
        host: Where its saved tensors are kept; None on the device.
        random: Returns a context in which its random numbers are drawn.
        tensors: That it makes and uses.

    Attributes:
        task: Ends it early.
        calls: Of batch norms.
        meeting: Where it waits; None before its first norm and at the end.
    """

    def __init__(
        self,
        function: Callable[[], object],
        worker: Worker,
        state: ThreadState,
        host: HostTensors | None,
        random: Callable[[], Any],
        tensors: TensorsOfOne,
    ) -> None:
        self._function = function
        self._worker = worker
        self._state = state
        self._host = host
        self._random = random
        self.task = Task(self._run)
        self.calls = NormCalls(self._suspend, host, tensors)
        self.meeting: Meeting | None = None

    def advance(self, reply: Moments | None) -> None:
        """Run to the next norm, or to the end."""
        self.meeting = None
        with self._random():
            self.meeting = self.task.advance(self._worker, reply)

    def _suspend(self, meeting: Meeting) -> Any:
        if not self.task.is_in_its_thread:  # the backward of another micro-batch
            raise used_by_other(self.calls.tensors.number)
        return self.task.suspend(meeting)

    def _run(self, _suspend: Any) -> None:
        self._state.context.copy().run(self._run_in_state)

    def _run_in_state(self) -> None:
        moved = nullcontext() if self._host is None else self._host.moving()
        with self._state.entered(), self.calls.mode(), moved:
            self._function()


def combined(meetings: Sequence[Meeting]) -> Meeting | None:
    """Return the meeting of all micro-batches of this rank."""
    if not meetings:
        return None
    first, parts = meetings[0], [meeting.own for meeting in meetings]
    if first.is_backward:
        own = Moments(parts[0].count, torch.stack([part.values for part in parts]).sum(0))
    else:
        own = Moments.combined([part for part in parts if part.count] or parts)
    return Meeting(first.norm, first.is_backward, own, first.running, first.momentum, first.num_batches)


def check_same(first: Meeting | None, other: Meeting | None, index: int) -> None:
    """Raise unless a micro-batch waits where the first one does."""
    if (first and str(first)) == (other and str(other)) and _running(first) == _running(other):
        return
    backward = any(meeting is not None and meeting.is_backward for meeting in (first, other))
    hint = " A loss without items needs a gradient, too: return the sum over nothing." if backward else ""
    raise InputError(
        f"micro-batch {index + 1} reaches {other or 'the end'}, and micro-batch 1 reaches {first or 'the end'}: "
        'batch_norm="exact" needs every micro-batch to run the same batch norms in the same order. Take branches that '
        f"depend on the data out of the model, or leave batch_norm= out.{hint}"
    )


def _running(meeting: Meeting | None) -> list[int]:
    running: Sequence[Tensor | None] = () if meeting is None else meeting.running
    return [id(buffer) for buffer in running]
