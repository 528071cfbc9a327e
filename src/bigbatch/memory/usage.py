"""Available memory, peak memory, and detection of out-of-memory errors."""

import gc
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bigbatch.errors import BigbatchError
from bigbatch.memory.allocation_tracker import storages
from bigbatch.memory.limit import MemoryLimit, default_limit, describe_bytes, parse_memory

HEADROOM_PERCENT = 5  # of a limit: for fragmentation, the gaps between allocations
PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")

_OUT_OF_MEMORY = re.compile(
    "|".join(
        (
            r"\bout of memory\b",  # the caching allocators (CUDA, HIP, XPU, MPS), the CUDA runtime, Triton, XLA
            r"can't allocate memory|DefaultCPUAllocator: not enough memory",  # the allocator of the CPU; on Windows
            r"\bstd::bad_alloc\b",
            r"\b(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS|HIPSPARSE|MIOPEN)_STATUS_ALLOC_FAILED\b|\bCUFFT_ALLOC_FAILED\b",
            r"\bCUDNN_STATUS_INTERNAL_ERROR_(HOST|DEVICE)_ALLOCATION_FAILED\b",
            r"cuDNN error: CUDNN_STATUS_NOT_SUPPORTED\.",  # also without workspace; accelerate and Lightning count it
            r"PT_DEVMEM Allocation failed",  # HPU
        )
    ),
    re.IGNORECASE,
)


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak memory of this process so far in bytes, or None if the platform does not report it.

    On CUDA, the memory that torch allocated on ``device`` since `restart_peak`, if that was called; elsewhere the
    resident set of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def restart_peak(device: torch.device) -> None:
    """Let `peak_bytes` count from now on; no effect on devices other than CUDA, whose peak is that of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is a failed allocation, on a device or on the host.

    The allocators of torch raise ``torch.OutOfMemoryError``, or a ``RuntimeError`` with a sentence of their own; so do
    the libraries under it, and code that re-raises their messages. False for the errors of bigbatch, which may quote
    such a sentence: a smaller micro-batch cannot help there.
    """
    if isinstance(error, BigbatchError):
        return False
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def free_cached_memory() -> None:
    """Free cached memory: collect garbage, then empty the CUDA cache.

    Call outside the ``except`` block, whose traceback references tensors.
    """
    gc.collect()
    torch.cuda.empty_cache()  # no-op if CUDA is not in use


@dataclass(frozen=True)
class MemoryBudget:
    """Memory that a training step may use.

    Attributes:
        limit_bytes: The requested limit, or the free memory less a margin.
        usable_bytes: The part of it that tensors may use at the peak: 5 % are reserved for fragmentation, and on the
            CPU the other memory of the process.
        requested: The limit as requested; None if none was.
    """

    limit_bytes: int
    usable_bytes: int
    requested: str | None = None

    @classmethod
    def from_limit(cls, limit_bytes: int, requested: str | None, *, reserved_bytes: int = 0) -> "MemoryBudget":
        """Build the budget of a limit of which ``reserved_bytes`` are used by something else than tensors."""
        usable_bytes = (limit_bytes - reserved_bytes) * (100 - HEADROOM_PERCENT) // 100
        return cls(limit_bytes, max(0, usable_bytes), requested)

    def __str__(self) -> str:
        limit = describe_bytes(self.limit_bytes)
        source = f"memory is limited to {self.requested or f'{limit} (free memory less a margin)'}"
        if not self.usable_bytes:
            return f"{source}, all of which this process uses outside of tensors"
        return f"{source}, of which {describe_bytes(self.usable_bytes)} are usable for tensors"


def resolve_memory_budget(
    memory: str | int | MemoryLimit | None, device: torch.device, resident: Iterable[Tensor]
) -> MemoryBudget:
    """Return the memory that a training step may use.

    Args:
        memory: An amount, a share such as ``"80%"``, or None for the free memory less a margin. On CUDA it covers the
            tensors of this process on that device; on the CPU the whole process.
        device: Device of the training.
        resident: Tensors of the training that are allocated already.

    Raises:
        ValueError: ``memory`` is not a valid limit, or more than the device has.
    """
    if memory is not None and not isinstance(memory, MemoryLimit):
        memory = parse_memory(memory)
    resident_bytes = bytes_on(resident, device)
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        free_bytes += torch.cuda.memory_reserved(device)
        cap_bytes = int(torch.cuda.get_per_process_memory_fraction(device) * total_bytes)
        reserved_bytes = 0
    else:
        free_bytes, total_bytes = _host_memory()
        free_bytes, cap_bytes = free_bytes + resident_bytes, total_bytes
        reserved_bytes = max(0, _resident_bytes() - resident_bytes)
    if memory is None:
        limit_bytes = min(default_limit(free_bytes, total_bytes), cap_bytes)
        reserved_bytes = 0  # not free, so not part of the limit
    else:
        limit_bytes = min(memory.to_bytes(total_bytes), cap_bytes)
    return MemoryBudget.from_limit(limit_bytes, None if memory is None else str(memory), reserved_bytes=reserved_bytes)


def bytes_outside(tensors: Iterable[Tensor]) -> int:
    """Return the resident set of this process without tensors: Python, libraries, data."""
    return max(0, _resident_bytes() - bytes_on(tensors, torch.device("cpu")))


def bytes_on(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Return the memory of tensors on devices of one type, that of views counted once."""
    on_device = (tensor for tensor in tensors if tensor.device.type == device.type)
    return sum({memory._cdata: memory.nbytes() for tensor in on_device for memory in storages(tensor)}.values())


def host_memory() -> tuple[int, int]:
    """Return the free and total bytes of host memory for this process, within its control groups."""
    return _host_memory()


def _host_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> tuple[int, int]:
    """Return the free and total bytes for this process: of the machine, or of its tightest control group."""
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free_bytes = total_bytes // 2
    with suppress(OSError, StopIteration, ValueError, IndexError):
        lines = (proc / "meminfo").read_text().splitlines()
        free_bytes = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    for limit_bytes, used_bytes in _cgroups(proc, cgroup):
        total_bytes = min(total_bytes, limit_bytes)
        free_bytes = min(free_bytes, limit_bytes - used_bytes)
    return max(0, free_bytes), total_bytes


def _cgroups(proc: Path, cgroup: Path) -> Iterator[tuple[int, int]]:
    """Yield the limit and the usage in bytes of every control group (v1 or v2) of this process.

    A group is mounted at the path in ``/proc/self/cgroup``, or, inside a container, at the root.
    """
    paths = {"": "", "memory": ""}
    with suppress(OSError, ValueError):
        lines = (proc / "self" / "cgroup").read_text().splitlines()
        paths |= {kinds: path.strip("/") for _, kinds, path in (line.split(":", 2) for line in lines)}
    for root, path, *names in (
        (cgroup, paths[""], "memory.max", "memory.current", ""),
        (cgroup / "memory", paths["memory"], "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        for group in (root / path, *(root / parent for parent in Path(path).parents)):
            with suppress(OSError, ValueError):  # missing, or "max": no limit
                yield _read_group(group, *names)


def _read_group(group: Path, limit: str, usage: str, prefix: str) -> tuple[int, int]:
    limit_bytes, used_bytes = (int((group / name).read_text()) for name in (limit, usage))
    with suppress(OSError, ValueError):  # the page cache is reclaimable, so it counts as free
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used_bytes -= sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return limit_bytes, max(0, used_bytes)


def _resident_bytes(proc: Path = PROC) -> int:
    """Return the resident set of the process in bytes; its peak so far where only that is available."""
    with suppress(OSError, ValueError, IndexError):
        return int((proc / "self" / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_bytes(torch.device("cpu")) or 0
