"""Memory: what has been used so far, and whether it ran out."""

import gc
import sys

import torch


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
    """Tell whether an error says that an allocation failed, on a device or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def release_memory() -> None:
    """Give back what nobody holds any more. Call it outside the ``except`` block, whose traceback holds tensors."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA is not in use
