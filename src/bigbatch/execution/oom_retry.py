"""Retry after out-of-memory inside a window: every sample still counts exactly once.

    run rows → out of memory → restore counts, random state, buffers → rows again → its halves → … → one sample

The divisor of a window does not depend on how it is split, so a micro-batch that failed may be run again in pieces. A
backward that failed half-way has added to some parameters and not to others: the pieces add to those others only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from bigbatch.accumulation.pending_update import PendingUpdate
from bigbatch.distributed.gradient_sync import Microbatch
from bigbatch.errors import MemoryLimitError, first_line
from bigbatch.execution.runner import WRITE_TO_COPY, MicrobatchRunner, WindowInputs
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory


def too_large(sample: int, message: str, lengths: Sequence[int] | None) -> MemoryLimitError:
    """Return the error about a sample that does not fit in memory by itself."""
    length = "" if lengths is None else f", {lengths[sample]:,} tokens long,"
    return MemoryLimitError(
        f"sample {sample} of the batch{length} does not fit in memory by itself ({message}). Shorten it, or use "
        "activation checkpointing, lower-precision weights or fewer trained parameters."
    )


def halves(rows: Sequence[int]) -> list[Sequence[int]]:
    """Return the samples of the two halves of a micro-batch."""
    middle = (len(rows) + 1) // 2
    return [rows[:middle], rows[middle:]]


# Random states of the CPU and of the CUDA device; each buffer with its copy.
_State: TypeAlias = tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]


class OomRetry(MicrobatchRunner):
    """Runs micro-batches directly; if memory runs out, again, and then in halves.

    The first micro-batch shows what a forward changes, and only that is saved before later ones: most models draw no
    random numbers and write no buffers. Repeated when the model changes between training and evaluation mode.

    Args:
        model: As for `MicrobatchRunner`; its buffers are restored after a failed attempt.
        device: Its random state is restored, with that of the CPU.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(model)
        self._device = device
        self._checked_in_training: bool | None = None
        self._buffers: list[Tensor] = []
        self._draws_random_numbers = True
        self._free_more: Callable[[], object] | None = None

    @contextmanager
    def freeing(self, free_more: Callable[[], object]) -> Iterator[None]:
        """Free other memory that a window holds, too, after each attempt that runs out of memory inside."""
        self._free_more = free_more
        try:
            yield
        finally:
            self._free_more = None

    def prepare(self) -> None:
        """Prepare for a window, before it opens."""
        self.retries = 0
        if self._checked_in_training is not self._model.training:
            self._checked_in_training = None
            self._buffers, self._draws_random_numbers = list(self._model.buffers()), True

    def run(
        self,
        microbatch: Microbatch,
        pending: PendingUpdate,
        *,
        only: list[Tensor] | None = None,
        is_repeated: bool = False,
    ) -> None:
        """Add the gradient of one micro-batch, each sample exactly once.

        Args:
            microbatch: The indices of its samples.
            pending: The window.
            only: The parameters that did not receive the gradient of these samples yet; None for all.
            is_repeated: Whether an attempt on these samples has run out of memory.

        Raises:
            MemoryLimitError: One sample does not fit in memory by itself, or the loss has written to the batch.
        """
        rows: Sequence[int] = microbatch.content
        inputs = self._inputs
        assert inputs is not None, "no window is open"
        state = self._save() if self._draws_random_numbers or self._buffers else None
        failure = self._attempt(inputs, rows, pending, state, only)
        if failure is None:
            return
        message, only = failure
        if not is_repeated:  # with the cache freed, the whole may fit
            self.run(microbatch, pending, only=only, is_repeated=True)
        elif len(rows) > 1:
            for half in halves(rows):
                self.run(Microbatch(half), pending, only=only, is_repeated=True)
        else:
            raise too_large(rows[0], message, self.inputs.lengths)

    def _attempt(
        self,
        inputs: WindowInputs,
        rows: Sequence[int],
        pending: PendingUpdate,
        state: _State | None,
        only: list[Tensor] | None,
    ) -> tuple[str, list[Tensor] | None] | None:
        """Add the gradient of some samples; if memory runs out, undo what they did.

        Returns:
            None; or why memory ran out, and the parameters that still need the gradient: None for all.
        """
        sums, totals = pending.sums, pending.loss_totals
        versions, num_recorded = sums.snapshot_versions(), totals.num_recorded
        try:
            pending.add(inputs.loss_fn(self._model, inputs.take(rows)), only=only)
            if self._checked_in_training is None and state is not None:
                self._drop_unchanged(state)
            return None
        except RuntimeError as error:
            # Only a forward that finished is recorded. One that did not has added nothing to any parameter.
            forward_finished = totals.num_recorded != num_recorded
            if not is_out_of_memory(error) or (forward_finished and not sums.can_name_leaves):
                raise
            message = first_line(error)
            if inputs.were_written:
                raise MemoryLimitError(
                    f"memory ran out in a micro-batch of {len(rows)} samples ({message}), which cannot be run again, "
                    f"because loss_fn has written to the batch in place: {WRITE_TO_COPY} Or pass a smaller microbatch."
                ) from error
        # Outside the except block: inside it, the traceback holds the tensors of the attempt.
        self.retries += 1
        totals.rollback(num_recorded)
        if state is not None:
            self._restore(state)
        if forward_finished:
            earlier = None if only is None else {id(parameter) for parameter in only}
            unchanged = sums.unchanged_since(versions)
            only = [parameter for parameter in unchanged if earlier is None or id(parameter) in earlier]
        if self._free_more is not None:
            self._free_more()
        free_cached_memory()
        return message, only

    def _save(self) -> _State:
        on_cpu = torch.get_rng_state()
        on_device = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return on_cpu, on_device, [(buffer, buffer.detach().clone()) for buffer in self._buffers]

    def _restore(self, state: _State) -> None:
        on_cpu, on_device, buffers = state
        torch.set_rng_state(on_cpu)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, self._device)
        with torch.no_grad():
            for buffer, copy in buffers:
                buffer.copy_(copy)

    def _drop_unchanged(self, state: _State) -> None:
        self._checked_in_training = self._model.training
        on_cpu, on_device, buffers = state
        self._draws_random_numbers = not torch.equal(on_cpu, torch.get_rng_state()) or (
            on_device is not None and not torch.equal(on_device, torch.cuda.get_rng_state(self._device))
        )
        # By value: batch norm writes its statistics without a new version. Waits for the device, this once.
        self._buffers = [buffer for buffer, copy in buffers if not torch.equal(buffer, copy)]
