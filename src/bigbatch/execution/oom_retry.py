"""Out-of-memory in mid-window: every sample still counts exactly once.

    try rows → out of memory → take back counts, random state, buffers → rows again → its halves → … → one sample

The divisor of a window does not depend on how it is cut, so a micro-batch that failed may be run again in pieces. A
backward that failed half-way has added to some parameters and not to others: the pieces add to those others alone.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from bigbatch.errors import MemoryLimitError, ShardedMemoryError
from bigbatch.memory.usage import free_cached_memory, is_out_of_memory

if TYPE_CHECKING:
    from bigbatch.accumulation.pending_update import PendingUpdate


# Random states of the CPU and of the CUDA device; each buffer with its copy.
_State: TypeAlias = tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]


def add_sharded(pending: "PendingUpdate", forward: Callable[[Sequence[int]], Any], rows: Sequence[int]) -> None:
    """Add the gradient of the samples ``rows`` of a sharded model, whose other ranks run the same layer at that time.

    Raises:
        ShardedMemoryError: Memory ran out.
    """
    try:
        pending.add(forward(rows), None)
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        message = str(error).partition("\n")[0]
    free_cached_memory()
    raise ShardedMemoryError(
        f"memory ran out in a micro-batch of {len(rows)} samples ({message}), and the other ranks of a sharded model "
        "cannot wait for it to be cut: begin again from a checkpoint with smaller micro-batches."
    )


class OomRetry:
    """Run the micro-batches of windows, in smaller pieces where memory runs out.

        recovery.begin(transaction)
        for rows in groups:
            recovery.add(forward, rows)

    Args:
        model: Its buffers are put back when an attempt fails.
        device: Whose random generator is put back, beside that of the CPU.

    Attributes:
        num_failures: Attempts of this window that ran out of memory.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._learned_in_training: bool | None = None
        self._buffers: list[Tensor] = []
        self._random = True
        self.num_failures = 0

    def begin(self, pending: "PendingUpdate", lengths: Sequence[int] | None = None) -> None:
        """Begin with a window.

        Args:
            pending: What the micro-batches are added to.
            lengths: Tokens of each sample of the batch, for the message about one that does not fit.

        Its first micro-batch shows what a forward changes, and that alone is remembered from then on: most models draw
        no random numbers and write no buffers. Learned anew when the model goes in or out of training mode.
        """
        self._pending = pending
        self._lengths = lengths
        self.num_failures = 0
        if self._learned_in_training is not self._model.training:
            self._learned_in_training = None
            self._buffers, self._random = list(self._model.buffers()), True

    def add(
        self,
        forward: Callable[[Sequence[int]], Any],
        rows: Sequence[int],
        *,
        only: list[Tensor] | None = None,
        again: bool = True,
    ) -> None:
        """Add the gradient of the samples ``rows``, each exactly once.

        Args:
            forward: Gives ``(loss_sum, items)``, or terms, of some samples.
            rows: Indices of samples.
            only: The parameters that still want these samples' share; all by default.
            again: Whether to try the same samples once more, before their halves.

        Raises:
            MemoryLimitError: One sample alone does not fit.
        """
        versions, num_recorded = self._pending.sums.snapshot_versions(), self._pending.loss_totals.num_recorded
        state = self._save() if self._random or self._buffers else None
        try:
            self._pending.add(forward(rows), None, only=only)
            if self._learned_in_training is None and state is not None:
                self._drop_unchanged(state)
            return
        except RuntimeError as error:
            # Only a forward that came through is recorded. One that did not has added nothing, and all want its share.
            came_through = self._pending.loss_totals.num_recorded != num_recorded
            if not is_out_of_memory(error) or (came_through and not self._pending.sums.can_name_leaves):
                raise
            message = str(error).partition("\n")[0]
        # Outside the except block: in there, the traceback holds the tensors of the attempt.
        self.num_failures += 1
        self._pending.loss_totals.rollback(num_recorded)
        if state is not None:
            self._restore(state)
        if came_through:
            earlier = None if only is None else {id(parameter) for parameter in only}
            unchanged = self._pending.sums.unchanged_since(versions)
            only = [parameter for parameter in unchanged if earlier is None or id(parameter) in earlier]
        free_cached_memory()
        self._add_smaller(forward, rows, only, again, message)

    def _add_smaller(
        self,
        forward: Callable[[Sequence[int]], Any],
        rows: Sequence[int],
        wanting: list[Tensor] | None,
        again: bool,
        message: str,
    ) -> None:
        if again:  # what was cached in pieces may fit as a whole now
            self.add(forward, rows, only=wanting, again=False)
        elif len(rows) > 1:
            middle = (len(rows) + 1) // 2
            self.add(forward, rows[:middle], only=wanting, again=False)
            self.add(forward, rows[middle:], only=wanting, again=False)
        else:
            length = "" if self._lengths is None else f", {self._lengths[rows[0]]:,} tokens long,"
            raise MemoryLimitError(
                f"sample {rows[0]} of the batch{length} does not fit in memory by itself ({message}). Shorten it, or "
                "use activation checkpointing, narrower weights or fewer trained parameters."
            )

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
        self._learned_in_training = self._model.training
        on_cpu, on_device, buffers = state
        self._random = not torch.equal(on_cpu, torch.get_rng_state()) or (
            on_device is not None and not torch.equal(on_device, torch.cuda.get_rng_state(self._device))
        )
        # By value: batch norm writes its statistics without telling their version. Waits for the device, this once.
        self._buffers = [buffer for buffer, copy in buffers if not torch.equal(buffer, copy)]
