"""Gradients that are added on the device to sums in host memory, while backward continues.

    part of a sum ──copy──▶ slot on the device, where its gradient is added ──copy──▶ the sum in host memory

Copies in both directions and the additions of different parts overlap, with each other and with backward. They wait for
each other on the device; the thread that runs backward waits for none of them.
"""

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from bigbatch.errors import WindowStateError, first_line
from bigbatch.offload.arena import Arena
from bigbatch.offload.chunk_sizes import NUM_SUM_SLOTS, SUM_SLOT_BYTES
from bigbatch.offload.transfers import Transfers

_ALIGNED = 64  # elements: parts of a sum begin at whole lines of memory


class _Held(NamedTuple):
    """A gradient in use.

    Attributes:
        gradient: On the device.
        added: When it no longer is in use.
        computation: Has allocated its memory, and may use that for something else then.
    """

    gradient: Tensor
    added: Any
    computation: Any


class SumStreamer:
    """Adds gradients to sums in host memory, in the order in which they are passed.

        streamer = SumStreamer(transfers)
        streamer.add(total, gradient, replaces=False)   # returns before anything is added
        streamer.wait()                                 # all are added

    The bits are those of ``total.add_(gradient)`` on the device. Memory of the device is allocated with the first
    gradient, and freed by `wait`.

    Args:
        transfers: Copies.
        slot_bytes: The most of a sum that is copied at once, a multiple of 512; by default 32 MiB.

    Attributes:
        slot_bytes: As passed.
    """

    def __init__(self, transfers: Transfers, slot_bytes: int | None = None) -> None:
        self._transfers = transfers
        self.slot_bytes = SUM_SLOT_BYTES if slot_bytes is None else slot_bytes
        self._arena: Arena | None = None
        self._held: deque[_Held] = deque()
        self._held_bytes = 0
        self._written: dict[int, Any] = {}  # by the address of a sum: the last copy to it
        self._error: BaseException | None = None
        self._turn = threading.Lock()  # backwards may run in several threads

    def device_bytes(self, gradient_bytes: int) -> int:
        """Return the memory of the device for slots and for gradients in use, of which the largest has so many."""
        slots_bytes = NUM_SUM_SLOTS * self.slot_bytes
        return slots_bytes + max(slots_bytes, gradient_bytes)

    def add(self, total: Tensor, gradient: Tensor, *, replaces: bool) -> None:
        """Start to add a gradient to a sum, or to replace the sum by it.

        The gradient is in use until its memory is used for something else, which waits for that on the device.

        Args:
            total: In host memory, contiguous, 1-d.
            gradient: On the device, contiguous, 1-d, of the same size; any dtype.
            replaces: Whether the sum has no value yet.

        Raises:
            RuntimeError: A copy cannot be started, or the device has too little memory. Nothing of this gradient is
                added.
            WindowStateError: The same, after a part of the gradient was added; or an earlier addition failed.
        """
        transfers = self._transfers
        with self._turn:
            self._check()
            if self._arena is None:
                self._arena = Arena(transfers, [self.slot_bytes], self.slot_bytes, num_slots=NUM_SUM_SLOTS)
            computation = transfers.computation()
            with transfers.beside():
                try:
                    self._add_in_parts(self._arena, total, gradient, replaces=replaces)
                finally:
                    self._hold(_Held(gradient, transfers.computed(), computation))

    def _add_in_parts(self, arena: Arena, total: Tensor, gradient: Tensor, *, replaces: bool) -> None:
        num_parts = max(1, -(-total.nbytes // self.slot_bytes))
        size = -(-total.numel() // (num_parts * _ALIGNED)) * _ALIGNED
        written = self._written.get(total.data_ptr(), [])
        for start in range(0, total.numel(), max(1, size)):
            parts = total[start : start + size], gradient[start : start + size]
            try:
                copy = self._add_part(arena, *parts, after=None if replaces else written)
            except BaseException as error:
                if not start and isinstance(error, RuntimeError):  # nothing was copied to the host
                    raise
                self._error = self._error or error  # no part of the sum is used
                if isinstance(error, RuntimeError):
                    self._check()
                raise
            self._written[total.data_ptr()] = [] if copy is None else [copy]

    def _add_part(self, arena: Arena, total: Tensor, gradient: Tensor, *, after: Sequence[Any] | None) -> Any:
        """Add a part of a gradient; return the copy to the host.

        Args:
            arena: Has the slots.
            total: Part of the sum.
            gradient: The same part of the gradient.
            after: Copies to the sum so far; None for a sum that has no value yet.
        """
        transfers, place = self._transfers, arena.place(total.nbytes)
        slot, left = place.memory.view(total.dtype), None
        if after is not None:
            transfers.use(transfers.to_device(slot, total, after=[*place.after, *after]))
        else:
            for copy in place.after:
                transfers.use(copy)
        try:
            if after is None:
                slot.copy_(gradient)
            else:
                slot.add_(gradient)
            left = transfers.to_host(total, slot)
        finally:
            arena.release(place, transfers.computed() if left is None else left)
        return left

    def _hold(self, held: _Held) -> None:
        """Keep a gradient until it is added; let the memory of older ones be used again, by computation that waits."""
        self._held.append(held)
        self._held_bytes += held.gradient.nbytes
        while self._held_bytes > NUM_SUM_SLOTS * self.slot_bytes and len(self._held) > 1:
            oldest = self._held.popleft()
            self._held_bytes -= oldest.gradient.nbytes
            self._transfers.use(oldest.added, oldest.computation)

    def wait(self) -> None:
        """Wait until everything is added, and free the memory of the device.

        Raises:
            RuntimeError: A copy or an addition failed on the device.
            WindowStateError: A gradient was added in part.
        """
        self._finish()
        self._check()

    def discard(self) -> None:
        """Wait until nothing is in progress, free the memory of the device and forget errors: the sums are dropped."""
        self._finish()
        self._error = None

    def _finish(self) -> None:
        with self._turn:
            self._transfers.finish()
            self._arena, self._held_bytes = None, 0
            self._held.clear()
            self._written.clear()

    def _check(self) -> None:
        """Raise if an addition has failed."""
        if self._error is not None:
            reason = first_line(self._error) or type(self._error).__name__
            raise WindowStateError(
                f"a gradient was added to its sum in host memory in part ({reason}), and the window has changed "
                "nothing: run it again."
            ) from self._error
