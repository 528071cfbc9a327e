"""Base class of the fastest loops: every micro-batch has the same shape, and the model is compiled for it."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bigbatch.errors import BigbatchError
from bigbatch.lm.bench.meter import Meter
from bigbatch.lm.bench.rows import Rows
from bigbatch.lm.bench.shared_model import SharedModel
from bigbatch.lm.data.dataset import IGNORED

LossSum = Callable[[Rows], Tensor]


class UnsupportedWorkloadError(BigbatchError):
    """A contestant does not support a workload, or is installed in another version; the message is its row."""


class PackedLoop(ABC):
    """A contestant whose micro-batches all have the same shape.

    Args:
        samples: Rows of the longest sequence per micro-batch.

    Attributes:
        first_update_s: Seconds from the beginning of the first turn until the end of its first update.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.notes: list[str] = []
        self.first_update_s: float | None = None
        self._microbatches: list[Rows] = []
        self._loss_sum: LossSum | None = None

    def turn(self, stage: SharedModel, meter: Meter) -> None:
        """Warm up with whole updates, then run the measured one."""
        started_s = time.perf_counter()
        if self._loss_sum is None:
            microbatches = self.cut(stage)
            on_cuda = stage.device.type == "cuda"
            self._microbatches = [rows.pinned() for rows in microbatches] if on_cuda else microbatches
            self._loss_sum = self.build(stage)
            self.notes.append(_describe(microbatches, self._num_labels + len(stage.samples)))
        try:
            if self.first_update_s is None:
                self._update(stage, self._loss_sum)  # compiles
                stage.synchronize()
                self.first_update_s = time.perf_counter() - started_s
                stage.optimizer.zero_grad()
            self._update(stage, self._loss_sum)
            stage.reset()
            meter.start()
            self._update(stage, self._loss_sum)
            meter.stop()
        finally:
            self.release()

    @property
    def _num_labels(self) -> int:
        return sum(int((rows.labels != IGNORED).sum()) for rows in self._microbatches)

    def _update(self, stage: SharedModel, loss_sum: LossSum) -> None:
        """Run one update: the sum of all losses, divided once."""
        num_labels = self._num_labels
        self.begin_window()
        for rows in self._microbatches:
            (loss_sum(rows.to(stage.device)) / num_labels).backward()  # type: ignore[no-untyped-call]
            self.after_backward()
        self.end_window()
        stage.optimizer.step()

    @abstractmethod
    def cut(self, stage: SharedModel) -> list[Rows]:
        """Cut the batch into micro-batches, on the CPU."""

    @abstractmethod
    def build(self, stage: SharedModel) -> LossSum:
        """Build the model from the shared parameters; return the sum of the losses of a micro-batch."""

    def begin_window(self) -> None:  # noqa: B027
        """Prepare the weights of an update."""

    def after_backward(self) -> None:  # noqa: B027
        """Accumulate the gradients of a micro-batch, where autograd does not."""

    def end_window(self) -> None:  # noqa: B027
        """Finish the gradients of an update."""

    def release(self) -> None:  # noqa: B027
        """Free the memory of a turn."""


def _describe(microbatches: Sequence[Rows], tokens: int) -> str:
    rows, length = microbatches[0].ids.shape
    padding = len(microbatches) * rows * length - tokens
    shape = f"{rows} × {length:,} tokens" if rows > 1 else f"{length:,} tokens"
    return f"{len(microbatches)} micro-batches of {shape}, of which {padding:,} are padding"


def compiled(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """Compile a function for fixed shapes on CUDA; return it as it is elsewhere, for a trial without a GPU."""
    return torch.compile(function, fullgraph=True, dynamic=False) if device.type == "cuda" else function
