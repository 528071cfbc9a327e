"""Many launches as one: what a function puts on a CUDA device, recorded to be put there again."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch


def record(run: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:
    """Record what a function launches on the current CUDA device, which does not run it.

    Args:
        run: Works on tensors that stay where they are. What it allocates stays with the recording.
        pool: Memory that recordings share which never run at the same time; their own by default.

    Raises:
        RuntimeError: It does what cannot be recorded, such as to wait for the device.
    """
    graph = torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")  # beside the error that made it so
            with torch.cuda.graph(graph, pool=pool):
                run()
    except BaseException:
        _end(pool)
        raise
    return graph


def _end(pool: Any) -> None:
    """Tell the allocator that a recording is over which failed: until then it gives no memory back, of any pool."""
    with suppress(RuntimeError):  # it knows
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
