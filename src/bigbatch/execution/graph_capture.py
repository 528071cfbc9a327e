"""Capture what a function launches on a CUDA device as a graph, and end a capture that fails."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


def capture(
    run: Callable[[], None],
    pool: Any = None,
    *,
    stream: torch.cuda.Stream | None = None,
    frees_cache: bool = True,
) -> torch.cuda.CUDAGraph:
    """Capture what a function launches on the current CUDA device as a graph, without running it.

    Args:
        run: Uses tensors that stay in place. What it allocates belongs to the graph.
        pool: Memory pool shared by graphs that never run at the same time; by default a pool of its own.
        stream: Of the capture, the same for all graphs of a pool; by default one of torch.
        frees_cache: Whether to wait for the device and free the memory that the allocator has cached, which cannot be
            freed during a capture.

    Raises:
        RuntimeError: The function does something that cannot be captured, such as waiting for the device.
    """
    graph = torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    context = torch.cuda.graph(graph, pool=pool, stream=stream)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")  # follows the error that caused it
            with context if frees_cache else _capturing(graph, pool, context.capture_stream):
                run()
    except BaseException:
        _end_capture(pool)
        raise
    return graph


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, pool: Any, stream: Any) -> Iterator[None]:
    """Do what `torch.cuda.graph` does, but for waiting for the device and freeing its cached memory."""
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool)
        try:
            yield
        finally:
            graph.capture_end()


def _end_capture(pool: Any) -> None:
    """End a failed capture in the allocator, which frees no memory of any pool until then."""
    with suppress(RuntimeError):  # already ended
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
    _end_capture_of_random_state()


def _end_capture_of_random_state() -> None:
    """Let random numbers be drawn again after a failed capture, which leaves the generator as within a capture.

    A capture that succeeds sets it back. The graph is empty but for one copy, and is dropped.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    source, target = torch.zeros(1, device=device), torch.zeros(1, device=device)
    with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        target.copy_(source)
