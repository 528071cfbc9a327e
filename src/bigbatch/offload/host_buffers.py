"""Host memory that stays allocated, and pinned, between micro-batches whose tensors differ in size."""

import math
from bisect import bisect_left

import torch
from torch import Tensor

from bigbatch.errors import MemoryLimitError
from bigbatch.memory.limit import describe_bytes
from bigbatch.offload.host_memory import available_host_bytes
from bigbatch.offload.transfers import Transfers


class HostBuffers:
    """Buffers in turn for tensors of any size, as many as are in use at the same time.

        buffer = buffers.take(num_bytes)        # at least so large
        buffers.put(buffer)                     # after copies from and to it, or after the computation waits for them

    The smallest free buffer that is large enough is used. If there is none, the largest free one is replaced by one
    that is: the number of buffers grows with those in use alone, and their sizes up to the largest tensor. After a size
    that the host has no memory for, buffers of that size are freed when they are put back, for smaller ones.

    Args:
        transfers: Allocate the memory.
        is_limited: Whether what is available on the host is respected.

    Attributes:
        num_bytes: Allocated, in use or free.
    """

    def __init__(self, transfers: Transfers, *, is_limited: bool = True) -> None:
        self._transfers, self._is_limited = transfers, is_limited
        self._free: list[Tensor] = []  # by size
        self._refused = math.inf  # the smallest size that the host had no memory for
        self.num_bytes = 0

    def take(self, num_bytes: int) -> Tensor:
        """Return a buffer of at least so many bytes, uint8.

        Raises:
            torch.OutOfMemoryError: The host has too little memory: a smaller micro-batch needs less.
        """
        position = bisect_left(self._free, num_bytes, key=_size)
        if position < len(self._free):
            return self._free.pop(position)
        if self._free:
            self._drop()
        try:
            buffer = self._allocate(num_bytes)
        except MemoryLimitError as error:
            self._refused = num_bytes
            raise torch.OutOfMemoryError(f"out of host memory for inputs of layers: {error}") from error
        if num_bytes >= self._refused:
            self._refused = math.inf
        self.num_bytes += buffer.nbytes
        return buffer

    def put(self, buffer: Tensor) -> None:
        """Let a buffer be used again."""
        self._free.insert(bisect_left(self._free, buffer.nbytes, key=_size), buffer)
        while self._free and self._free[-1].nbytes >= self._refused:
            self._drop()

    def release(self) -> None:
        """Free the buffers that are not in use."""
        while self._free:
            self._drop()

    def _drop(self) -> None:
        self._transfers.finish()  # copies that the computation waits for may still run
        self.num_bytes -= self._free.pop().nbytes

    def _allocate(self, num_bytes: int) -> Tensor:
        if self._is_limited and num_bytes > (available := available_host_bytes()):
            raise MemoryLimitError(
                f"{describe_bytes(num_bytes)} are needed, and {describe_bytes(available)} are available."
            )
        return self._transfers.host_memory(num_bytes)


def _size(buffer: Tensor) -> int:
    return buffer.nbytes
