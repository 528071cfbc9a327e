"""Memory: what there is, what has been used so far, and whether it ran out."""

import gc
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bigbatch.errors import MemoryLimitError
from bigbatch.memory.allocation_tracker import storages
from bigbatch.memory.limit import MemoryLimit, default_limit, describe_bytes, parse_memory

HEADROOM_PERCENT = 5  # of a limit: for the gaps between allocations, which nobody else can use
PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def peak_bytes(device: torch.device) -> int | None:
    """Highest memory in bytes so far in this process, or None where the platform does not tell.

    For CUDA, what torch allocated on ``device``; elsewhere the resident set of the process. No counter is reset: other
    readers of the same statistics see what they would have seen.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that an allocation failed, on a device or on the host.

    Not so a `MemoryLimitError`, which may quote such an error: it says that nothing smaller can help.
    """
    if isinstance(error, MemoryLimitError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def free_cached_memory() -> None:
    """Give back what nobody holds any more. Call it outside the ``except`` block, whose traceback holds tensors."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA is not in use


@dataclass(frozen=True)
class MemoryBudget:
    """The memory that a training step may use.

    Attributes:
        limit_bytes: What was asked for, or what is free less a margin.
        usable_bytes: What of it tensors may take at the peak: less 5 % for the gaps between them, and on the CPU less
            what the process holds besides.
        requested: How it was asked for; None where nobody did.
    """

    limit_bytes: int
    usable_bytes: int
    requested: str | None = None

    @classmethod
    def from_limit(cls, limit_bytes: int, requested: str | None, *, reserved_bytes: int = 0) -> "MemoryBudget":
        """Make room of a limit, of which something else takes ``reserved_bytes``."""
        usable_bytes = (limit_bytes - reserved_bytes) * (100 - HEADROOM_PERCENT) // 100
        return cls(limit_bytes, max(0, usable_bytes), requested)

    def __str__(self) -> str:
        limit = describe_bytes(self.limit_bytes)
        source = f"memory is limited to {self.requested}" if self.requested else f"{limit} are free, less a margin"
        if not self.usable_bytes:
            return f"{source}, and this process holds as much without its tensors"
        return f"{source}, of which tensors may take {describe_bytes(self.usable_bytes)}"


def resolve_memory_budget(
    memory: str | int | MemoryLimit | None, device: torch.device, held: Iterable[Tensor]
) -> MemoryBudget:
    """Find how much memory a training step may use.

    Args:
        memory: An amount, a share such as ``"80%"``, or None for what is free now less a margin. On CUDA it covers the
            tensors of this process on that device; on the CPU the whole process.
        device: Where the training is.
        held: Tensors of the training that are there already.

    Raises:
        ValueError: It is no amount, or more than there is.
    """
    if memory is not None and not isinstance(memory, MemoryLimit):
        memory = parse_memory(memory)
    held_bytes = _bytes_of(held, device)
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        free_bytes += torch.cuda.memory_reserved(device)
        cap_bytes = int(torch.cuda.get_per_process_memory_fraction(device) * total_bytes)
        others_bytes = 0
    else:
        free_bytes, total_bytes = _host_memory()
        free_bytes, cap_bytes = free_bytes + held_bytes, total_bytes
        others_bytes = max(0, _resident_bytes() - held_bytes)
    if memory is None:
        limit_bytes = min(default_limit(free_bytes, total_bytes), cap_bytes)
        others_bytes = 0  # they are not free, and so not in the limit
    else:
        limit_bytes = min(memory.to_bytes(total_bytes), cap_bytes)
    return MemoryBudget.from_limit(limit_bytes, None if memory is None else str(memory), reserved_bytes=others_bytes)


def _bytes_of(tensors: Iterable[Tensor], device: torch.device) -> int:
    on_device = (tensor for tensor in tensors if tensor.device.type == device.type)
    return sum({memory._cdata: memory.nbytes() for tensor in on_device for memory in storages(tensor)}.values())


def _host_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> tuple[int, int]:
    """Give what is free and all there is, for this process: of the machine, or of the tightest container around it."""
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free_bytes = total_bytes // 2
    with suppress(OSError, StopIteration, ValueError, IndexError):
        lines = (proc / "meminfo").read_text().splitlines()
        free_bytes = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    for most_bytes, used_bytes in _containers(proc, cgroup):
        total_bytes = min(total_bytes, most_bytes)
        free_bytes = min(free_bytes, most_bytes - used_bytes)
    return max(0, free_bytes), total_bytes


def _containers(proc: Path, cgroup: Path) -> Iterator[tuple[int, int]]:
    """Yield the limit of every control group around this process, and what it uses; of either version.

    A group may lie where the process says, or where a container shows its own: at the root.
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
            with suppress(OSError, ValueError):  # not there, or "max": no limit
                yield _read_group(group, *names)


def _read_group(group: Path, most: str, used: str, prefix: str) -> tuple[int, int]:
    most_bytes, used_bytes = (int((group / name).read_text()) for name in (most, used))
    with suppress(OSError, ValueError):  # files that the kernel keeps for want of a better use of the memory
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used_bytes -= sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return most_bytes, max(0, used_bytes)


def _resident_bytes(proc: Path = PROC) -> int:
    """What the process holds of the host's memory now; its highest so far where the platform tells only that."""
    with suppress(OSError, ValueError, IndexError):
        return int((proc / "self" / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_bytes(torch.device("cpu")) or 0
