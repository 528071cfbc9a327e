"""Host memory for training state: what is available within control groups, and a refusal before a run starts."""

from bigbatch.errors import MemoryLimitError
from bigbatch.memory.limit import describe_bytes
from bigbatch.memory.usage import host_memory

RESERVED_BYTES = 2 * 2**30
"""Left to the process and to others: libraries, the data loader, a checkpoint that is being written. At least 5 % and
at most a quarter of the free memory."""


def available_host_bytes(*, num_processes: int = 1) -> int:
    """Return the host memory that the training state of one process may use now.

    Free memory of the machine, or of the tightest control group of this process, less a reserve. Memory that is pinned
    already, by this process or others, is not free.

    Args:
        num_processes: Processes of the run on this machine, which share it.
    """
    free_bytes, _ = host_memory()
    reserved = max(min(RESERVED_BYTES, free_bytes // 4), free_bytes // 20)
    return max(0, free_bytes - reserved) // num_processes


def check_host_memory(needed_bytes: int, available_bytes: int, *, level: str, num_processes: int = 1) -> None:
    """Refuse a level of offload whose pinned memory does not fit.

    Args:
        needed_bytes: Of one process.
        available_bytes: For one process, from `available_host_bytes`.
        level: For the message.
        num_processes: Processes of the run on this machine.

    Raises:
        MemoryLimitError: It does not fit.
    """
    if needed_bytes <= available_bytes:
        return
    each = "" if num_processes == 1 else f" for each of {num_processes} processes"
    raise MemoryLimitError(
        f"offload {level} needs {describe_bytes(needed_bytes)} of pinned host memory{each}, and "
        f"{describe_bytes(available_bytes)} are available: use a lower level, or free host memory."
    )
