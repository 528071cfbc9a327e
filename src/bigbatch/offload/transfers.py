"""Copies between host memory and a device, beside the computation.

    to_device: host ──▶ slot    waits for the slot; the computation waits for it
    to_host:   slot ──▶ host    waits for the computation so far
    beside:    computation      waits for the computation so far, which continues without waiting for it

On CUDA each of them has a stream of its own and host memory is pinned. On the CPU both sides are memory of the
process, and every copy is made at once: the same calls in the same order.
"""

import mmap
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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

    def to_device(self, target: Tensor, source: Tensor, *, after: Sequence[Any] = ()) -> Any:
        """Copy host memory to the device; return what `use` waits for.

        Args:
            target: On the device.
            source: Host memory, of the same shape and dtype.
            after: Results of `to_host` or `computed`: what has to end first.
        """
        self.counts.num_to_device += 1
        self.counts.bytes_to_device += source.nbytes
        return self._copy_to_device(target, source, after)

    def to_host(self, target: Tensor, source: Tensor) -> Any:
        """Copy memory of the device to the host, after the computation so far; return what later copies wait for."""
        self.counts.num_to_host += 1
        self.counts.bytes_to_host += source.nbytes
        return self._copy_to_host(target, source)

    def use(self, done: Any, by: Any = None) -> None:
        """Let computation wait for a copy, or for other computation.

        Args:
            done: Result of `to_device`, `to_host` or `computed`.
            by: What waits: a result of `computation`; by default that of this thread.
        """

    def computed(self) -> Any:
        """Return what later copies to the device wait for: the computation so far."""

    def computation(self) -> Any:
        """Return the computation of this thread, which `use` may let wait within `beside` or in another thread."""

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Compute beside the computation of this thread: after what it has done so far, and not before what follows."""
        yield

    def wait(self, copy: Any) -> None:
        """Wait for one copy on the host."""

    def finish(self) -> None:
        """Wait on the host for all copies, and for all that was computed in `beside`."""

    def _copy_to_device(self, target: Tensor, source: Tensor, after: Sequence[Any]) -> Any:
        target.copy_(source)

    def _copy_to_host(self, target: Tensor, source: Tensor) -> Any:
        target.copy_(source)


class CudaTransfers(Transfers):
    """Copies between pinned host memory and a CUDA device, on side streams."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._in, self._out = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        # Copies wait for its short kernels, which a product that uses all multiprocessors would delay.
        self._beside = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

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
        memory[:: mmap.PAGESIZE].zero_()  # the threads of torch make the pages: registration makes one after the other
        with torch.cuda.device(self.device):
            status = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0))  # type: ignore[no-untyped-call]
        if status:
            with suppress(RuntimeError):
                torch.zeros(1, device=self.device)  # CUDA reports the failure once more, with the next kernel
            raise MemoryLimitError(_no_host_memory(num_bytes, f"cudaHostRegister returned {status}"))
        weakref.finalize(pages, _unregister, memory.data_ptr()).atexit = False
        return memory

    def use(self, done: Any, by: Any = None) -> None:
        """Let computation wait for a copy, or for other computation."""
        (by or self.computation()).wait_event(done)

    def computed(self) -> Any:
        """Return what later copies to the device wait for: the computation so far."""
        return self.computation().record_event()

    def computation(self) -> Any:
        """Return the computation of this thread: its current stream."""
        return torch.cuda.current_stream(self.device)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Compute on a stream of its own, which waits for the current one; one thread at a time."""
        self._beside.wait_event(self.computed())
        with torch.cuda.stream(self._beside):
            yield

    def wait(self, copy: Any) -> None:
        """Wait for one copy on the host."""
        copy.synchronize()

    def finish(self) -> None:
        """Wait on the host for all copies, and for all that was computed in `beside`."""
        for stream in (self._in, self._beside, self._out):
            stream.synchronize()

    def _copy_to_device(self, target: Tensor, source: Tensor, after: Sequence[Any]) -> Any:
        for event in after:
            self._in.wait_event(event)
        with torch.cuda.stream(self._in):
            target.copy_(source, non_blocking=True)
            return self._in.record_event()

    def _copy_to_host(self, target: Tensor, source: Tensor) -> Any:
        self._out.wait_event(self.computed())
        with torch.cuda.stream(self._out):
            target.copy_(source, non_blocking=True)
            return self._out.record_event()


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
