"""Memory of the device that parts of training state in host memory pass through."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from bigbatch.offload.chunk_sizes import NUM_SLOTS
from bigbatch.offload.transfers import Transfers


class Place(NamedTuple):
    """Memory for one part.

    Attributes:
        memory: On the device, uint8.
        after: Copies, or computation, that have to end before it is written to.
        slot: Its number; None for all of the memory.
    """

    memory: Tensor
    after: Sequence[Any]
    slot: int | None


class Arena:
    """Slots in turn for parts up to a size; a larger part has all of the memory for itself.

    Slots are larger than asked for if that needs no more memory than the largest part does.

        arena = Arena(transfers, sizes, slot_bytes)
        place = arena.place(num_bytes)                  # free once the copies ``place.after`` have ended
        arena.release(place, transfers.to_host(...))

    Args:
        transfers: Allocate the memory.
        sizes: Bytes of all that will be placed.
        slot_bytes: Largest size of a slot that needs memory.
        num_slots: Parts that have memory at the same time.

    Raises:
        torch.OutOfMemoryError: The device has too little memory.
    """

    def __init__(
        self, transfers: Transfers, sizes: Sequence[int], slot_bytes: int, *, num_slots: int = NUM_SLOTS
    ) -> None:
        self._limit = max(slot_bytes, max(sizes, default=0) // num_slots)
        self._slot_bytes = max((size for size in sizes if self.is_small(size)), default=0)
        self._memory = transfers.device_memory(arena_bytes(sizes, slot_bytes, num_slots=num_slots))
        self._turn = 0
        freed = [transfers.computed()]  # what was in this memory before may be in use until then
        self._leaving: list[Sequence[Any]] = [freed] * num_slots

    def is_small(self, num_bytes: int) -> bool:
        """Return whether a part fits in a slot, so that it can arrive while another is computed on."""
        return num_bytes <= self._limit

    def place(self, num_bytes: int) -> Place:
        """Return memory for a part: that of the slot whose turn it is."""
        if not self.is_small(num_bytes):
            return Place(self._memory[:num_bytes], [copy for slot in self._leaving for copy in slot], None)
        slot = self._turn
        self._turn = (slot + 1) % len(self._leaving)
        start = slot * self._slot_bytes
        return Place(self._memory[start : start + num_bytes], self._leaving[slot], slot)

    def release(self, place: Place, copy: Any) -> None:
        """Let later parts use the memory of a part after a copy from it, or after computation that uses it."""
        left = [] if copy is None else [copy]
        if place.slot is None:
            self._leaving = [left] * len(self._leaving)
        else:
            self._leaving[place.slot] = left


def arena_bytes(sizes: Sequence[int], slot_bytes: int, *, num_slots: int = NUM_SLOTS) -> int:
    """Return the memory of an arena for parts of these sizes."""
    slot = max((size for size in sizes if size <= slot_bytes), default=0)
    return max([num_slots * slot, *sizes])
