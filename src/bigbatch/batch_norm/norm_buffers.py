"""Running statistics in a window: updated once for each norm, and put back if the window changes nothing."""

from collections.abc import Iterable

from torch import Tensor
from torch.nn.parameter import is_lazy

from bigbatch.batch_norm.moments import Moments
from bigbatch.batch_norm.norm_calls import Meeting


class NormBuffers:
    """Values of running statistics from the start of a window.

    Args:
        buffers: Those that forwards write by themselves; others are added when they are updated first.
    """

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self.add(buffers)
        self._counted: Tensor | None = None

    def arrive(self, meeting: Meeting, *, is_first: bool) -> None:
        """Note that a micro-batch waits in a forward: ``num_batches_tracked`` counts the first one only."""
        if meeting.num_batches is None or meeting.is_backward:
            return
        if is_first:
            self._counted = meeting.num_batches.detach().clone()
        elif self._counted is not None:
            meeting.num_batches.copy_(self._counted)

    def update(self, meeting: Meeting, moments: Moments) -> None:
        """Update running statistics, by the factor of the first micro-batch."""
        running, variance = meeting.running
        self.add([buffer for buffer in meeting.running if buffer is not None])
        moments.update(running, variance, meeting.momentum)

    def rollback(self) -> None:
        """Put back the values from the start."""
        for buffer, value in self._before.values():
            buffer.copy_(value)

    def add(self, buffers: Iterable[Tensor]) -> None:
        """Note values that are to be put back, unless they are known already."""
        for buffer in buffers:
            if id(buffer) not in self._before and not is_lazy(buffer):
                self._before[id(buffer)] = buffer, buffer.detach().clone()
