"""Memory of the device that chunks of state pass through during an update."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bigbatch.offload.chunk_sizes import NUM_SLOTS
from bigbatch.offload.state_chunk import StateChunk
from bigbatch.offload.transfers import Transfers


class Arena:
    """Slots in turn for chunks up to a size; a larger chunk has all of the memory for itself.

        arena = Arena(transfers, chunks, slot_bytes)
        memory, after = arena.place(chunk)              # free once the copies ``after`` have ended
        arena.release(chunk, transfers.to_host(...))

    Args:
        transfers: Allocate the memory.
        chunks: All that will be placed.
        slot_bytes: Largest size of a slot.

    Raises:
        torch.OutOfMemoryError: The device has too little memory.
    """

    def __init__(self, transfers: Transfers, chunks: Sequence[StateChunk], slot_bytes: int) -> None:
        self._limit = slot_bytes
        self._slot_bytes = max((chunk.host_bytes for chunk in chunks if self.is_small(chunk)), default=0)
        self._memory = transfers.device_memory(arena_bytes([chunk.host_bytes for chunk in chunks], slot_bytes))
        self._turn = 0
        self._slot_of: dict[int, int] = {}
        self._leaving: list[list[Any]] = [[] for _ in range(NUM_SLOTS)]

    def is_small(self, chunk: StateChunk) -> bool:
        """Return whether a chunk fits in a slot, so that it can arrive while another is computed on."""
        return chunk.host_bytes <= self._limit

    def place(self, chunk: StateChunk) -> tuple[Tensor, list[Any]]:
        """Return memory for a chunk, uint8, and the copies that have to end before it is written to."""
        if not self.is_small(chunk):
            return self._memory[: chunk.host_bytes], [copy for slot in self._leaving for copy in slot]
        slot = self._turn
        self._turn = (slot + 1) % NUM_SLOTS
        self._slot_of[id(chunk)] = slot
        start = slot * self._slot_bytes
        return self._memory[start : start + chunk.host_bytes], self._leaving[slot]

    def release(self, chunk: StateChunk, copy: Any) -> None:
        """Let later chunks use the memory of a chunk after a copy from it."""
        left = [] if copy is None else [copy]
        if self.is_small(chunk):
            self._leaving[self._slot_of[id(chunk)]] = left
        else:
            self._leaving = [left] * NUM_SLOTS


def arena_bytes(chunk_bytes: Sequence[int], slot_bytes: int) -> int:
    """Return the memory of an arena for chunks of these sizes."""
    slot = max((size for size in chunk_bytes if size <= slot_bytes), default=0)
    return max([NUM_SLOTS * slot, *chunk_bytes])
