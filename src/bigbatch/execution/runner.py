"""How the micro-batches of a window are run: base class, and the runner of ranks in lockstep."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from bigbatch.accumulation.pending_update import PendingUpdate
from bigbatch.batching.split import Split
from bigbatch.distributed.gradient_sync import Microbatch, never
from bigbatch.errors import ShardedMemoryError, WindowStateError, first_line
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory
from bigbatch.types import LossFunction

WRITE_TO_COPY = "let it make new tensors, such as x = x / 255 in place of x.div_(255)."


class WindowInputs(NamedTuple):
    """What the micro-batches of a window are computed from.

    Attributes:
        loss_fn: As for `bigbatch.Engine`.
        take: Returns the micro-batch of some samples, by their indices, on the device.
        lengths: Tokens of each sample, for messages; None if unknown.
        parts: The batch that micro-batches are taken from; None if it is not known.
    """

    loss_fn: LossFunction
    take: Callable[[Sequence[int]], Any]
    lengths: Sequence[int] | None = None
    parts: Split | None = None

    @property
    def were_written(self) -> bool:
        """Whether the loss has written to the batch in place, so that it cannot be run again."""
        return self.parts is not None and self.parts.was_written


class MicrobatchRunner(ABC):
    """Runs forward and backward of the micro-batches of windows, one window after the other.

        runner.prepare()
        with runner.window(WindowInputs(loss_fn, take)):
            for microbatch in pending.microbatches():
                runner.run(microbatch, pending)
            runner.end(pending)

    Args:
        model: The module that loss functions receive.

    Attributes:
        retries: Attempts in the last window that ran out of memory and were repeated.
        disabled_reason: Why a faster way to run is not used, in a few words; None if it is, or none was requested.
        captures_graphs: Whether it captures CUDA graphs, which must find no other graph of the parameters alive.
        runs_again: Whether it runs micro-batches more than once in every window, and needs copies of what a loss
            may write to.
        waits_for_ranks: Whether other ranks wait for this one within a window, so that all must agree to begin it.
        overlaps: Whether it can run the last micro-batch of a window while gradients are reduced.
        static_buffers: Gradient sums that the next window must use in place; None without any.
    """

    retries = 0
    captures_graphs = False
    runs_again = False
    waits_for_ranks = False
    overlaps = False
    disabled_reason: str | None = None
    static_buffers: Mapping[Tensor, Tensor] | None = None

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._inputs: WindowInputs | None = None

    @property
    def inputs(self) -> WindowInputs:
        """The inputs of the current window."""
        assert self._inputs is not None, "no window is open"
        return self._inputs

    def prepare(self) -> None:  # noqa: B027 - optional
        """Prepare for a window, before it opens."""

    def begin(self, num_samples: int) -> None:  # noqa: B027 - optional
        """Exchange what a window of this rank's samples needs to know of the other ranks, which all begin it."""

    @contextmanager
    def window(self, inputs: WindowInputs) -> Iterator[None]:
        """Run one window; its inputs are not referenced afterwards."""
        self._inputs = inputs
        try:
            yield
        finally:
            self._inputs = None

    def run_all(self, pending: PendingUpdate, should_abandon: Callable[[], bool] = never) -> None:
        """Run all micro-batches of the window."""
        for microbatch in pending.microbatches(should_abandon):
            self.run(microbatch, pending)
        self.end(pending, should_abandon)

    def run_all_again(self, pending: PendingUpdate) -> None:
        """Run all micro-batches once more, after `run_all`.

        Raises:
            WindowStateError: They have other values now.
        """
        if self.inputs.were_written:
            raise WindowStateError(
                f"loss_fn has written to its micro-batches in place, and the optimizer runs them again: {WRITE_TO_COPY}"
            )
        self.run_all(pending)

    @abstractmethod
    def run(self, microbatch: Microbatch, pending: PendingUpdate) -> None:
        """Add the gradient of one micro-batch, each sample exactly once."""

    def end(  # noqa: B027 - optional
        self, pending: PendingUpdate, should_abandon: Callable[[], bool] = never
    ) -> None:
        """Handle the end of the micro-batches, before the update."""

    def release(self) -> None:  # noqa: B027 - optional
        """Free memory that is held between windows."""


class LockstepRunner(MicrobatchRunner):
    """Runs micro-batches whose other ranks run the same layers, or the same loss, at the same time.

    Args:
        model: As for `MicrobatchRunner`.
        is_sharded: Whether the model is sharded; else the loss calls collectives.
    """

    def __init__(self, model: nn.Module, *, is_sharded: bool = True) -> None:
        super().__init__(model)
        self._is_sharded = is_sharded

    def run(self, microbatch: Microbatch, pending: PendingUpdate) -> None:
        """Add the gradient of one micro-batch; a padding one adds zeros.

        Raises:
            ShardedMemoryError: Memory ran out.
        """
        try:
            content = self.inputs.take(microbatch.content) if microbatch.counts else microbatch.content
            pending.add(self.inputs.loss_fn(self._model, content), counts=microbatch.counts)
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = first_line(error)
        free_cached_memory()
        size = len(microbatch.content) if microbatch.counts else 0
        raise lockstep_memory_error(size, message, is_sharded=self._is_sharded)


def lockstep_memory_error(num_samples: int, message: str, *, is_sharded: bool) -> ShardedMemoryError:
    """Return the error about a micro-batch in lockstep that ran out of memory; 0 samples are padding."""
    samples = f"a micro-batch of {num_samples} samples" if num_samples else "a padding micro-batch"
    ranks = "of a sharded model" if is_sharded else "that run in lockstep"
    return ShardedMemoryError(
        f"memory ran out in {samples} ({message}), and the other ranks {ranks} cannot wait for it to be split: "
        "start again from a checkpoint with smaller micro-batches."
    )
