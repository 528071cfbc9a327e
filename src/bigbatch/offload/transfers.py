"""Copies between host memory and a device, beside the computation.

    to_device: host ──▶ slot    waits for the slot; the computation waits for it
    to_host:   slot ──▶ host    waits for the computation so far

On CUDA each direction has a stream of its own and host memory is pinned. On the CPU both sides are memory of the
process, and every copy is made at once: the same calls in the same order.
"""

import mmap
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigbatch.errors import MemoryLimitError
from bigbatch.memory.limit import describe_bytes


@dataclass
class TransferCounts:
    """Copies so far.

    Attributes:
        num_to_device, num_to_host: Copies in each direction.
        bytes_to_device, bytes_to_host: Their bytes.
    """

    num_to_device: int = 0
    num_to_host: int = 0
    bytes_to_device: int = 0
    bytes_to_host: int = 0


class Transfers:
    """Copies between two pools of memory of the process: the implementation for the CPU.

        loaded = transfers.to_device(slot, host, after=[])
        transfers.use(loaded)               # the computation waits for the copy
        compute(slot)
        stored = transfers.to_host(host, slot)
        transfers.finish()                  # the host waits for all copies

    Attributes:
        device: The device.
        counts: Copies so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.counts = TransferCounts()

    def host_memory(self, num_bytes: int) -> Tensor:
        """Return uninitialized host memory, uint8 ``[num_bytes]``.

        Raises:
            MemoryLimitError: There is not enough.
        """
        try:
            return torch.empty(num_bytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise MemoryLimitError(_no_host_memory(num_bytes, str(error))) from error

    def device_memory(self, num_bytes: int) -> Tensor:
        """Return uninitialized memory of the device, uint8 ``[num_bytes]``."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def begin(self) -> None:
        """Let all later copies wait for the computation so far."""

    def to_device(self, target: Tensor, source: Tensor, *, after: Sequence[Any] = ()) -> Any:
        """Copy host memory to the device; return what `use` waits for.

        Args:
            target: On the device.
            source: Host memory, of the same shape and dtype.
            after: Results of `to_host`, which have to end first.
        """
        self.counts.num_to_device += 1
        self.counts.bytes_to_device += source.nbytes
        return self._copy_to_device(target, source, after)

    def to_host(self, target: Tensor, source: Tensor) -> Any:
        """Copy memory of the device to the host, after the computation so far; return what later copies wait for."""
        self.counts.num_to_host += 1
        self.counts.bytes_to_host += source.nbytes
        return self._copy_to_host(target, source)

    def use(self, loaded: Any) -> None:
        """Let the computation wait for a copy to the device."""

    def computed(self) -> Any:
        """Return what later copies to the device wait for: the computation so far."""

    def wait(self, copy: Any) -> None:
        """Wait for one copy on the host, in any thread."""

    def finish(self) -> None:
        """Wait for all copies on the host."""

    def _copy_to_device(self, target: Tensor, source: Tensor, after: Sequence[Any]) -> Any:
        target.copy_(source)

    def _copy_to_host(self, target: Tensor, source: Tensor) -> Any:
        target.copy_(source)


class CudaTransfers(Transfers):
    """Copies between pinned host memory and a CUDA device, on two side streams."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._in, self._out = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]

    def host_memory(self, num_bytes: int) -> Tensor:
        """Return pinned host memory, in pages of its own: torch's allocator would round it up to a power of two.

        It stays pinned as long as any tensor in it exists.
        """
        if not num_bytes:
            return torch.empty(0, dtype=torch.uint8)
        try:
            pages = mmap.mmap(-1, num_bytes)
        except (OSError, ValueError) as error:  # ValueError: a length that is not representable
            raise MemoryLimitError(_no_host_memory(num_bytes, str(error))) from error
        memory = torch.frombuffer(pages, dtype=torch.uint8)
        with torch.cuda.device(self.device):
            status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0))  # type: ignore[no-untyped-call]
        if status:
            raise MemoryLimitError(_no_host_memory(num_bytes, f"cudaHostRegister returned {status}"))
        weakref.finalize(pages, _unregister, memory.data_ptr()).atexit = False
        return memory

    def begin(self) -> None:
        """Let all later copies wait for the computation so far."""
        now = torch.cuda.current_stream(self.device).record_event()
        self._in.wait_event(now)
        self._out.wait_event(now)

    def use(self, loaded: Any) -> None:
        """Let the computation wait for a copy to the device."""
        torch.cuda.current_stream(self.device).wait_event(loaded)

    def computed(self) -> Any:
        """Return what later copies to the device wait for: the computation so far."""
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, copy: Any) -> None:
        """Wait for one copy on the host, in any thread; the processor is free meanwhile."""
        copy.synchronize()

    def finish(self) -> None:
        """Wait for all copies on the host."""
        self._in.synchronize()
        self._out.synchronize()

    def _copy_to_device(self, target: Tensor, source: Tensor, after: Sequence[Any]) -> Any:
        for event in after:
            self._in.wait_event(event)
        with torch.cuda.stream(self._in):
            target.copy_(source, non_blocking=True)
            return self._in.record_event()

    def _copy_to_host(self, target: Tensor, source: Tensor) -> Any:
        self._out.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(self._out):
            target.copy_(source, non_blocking=True)
            return self._out.record_event(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]


def make_transfers(device: torch.device) -> Transfers:
    """Return the transfers of a device."""
    return CudaTransfers(device) if device.type == "cuda" else Transfers(device)


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def _no_host_memory(num_bytes: int, reason: str) -> str:
    return (
        f"{describe_bytes(num_bytes)} of host memory for offloaded state cannot be allocated ({reason}): free host "
        "memory, raise the limit of this process on locked memory (ulimit -l), or use a lower level of offload."
    )
