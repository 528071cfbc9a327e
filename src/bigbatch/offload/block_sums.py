"""Additions to sums in host memory, by several threads of one process.

    sum, gradient → equal parts → each thread casts and adds a block at a time, while it is in its cache

Each thread runs the operations of torch on its own: with the threads of OpenMP instead, every operation ends with all
of them waiting for the slowest, which another thread of the process, such as the one that runs backward, has
interrupted.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor

BLOCK = 2**18
"""Elements that are cast and then added, while they are in the cache of a core.

Torch adds a tensor in bfloat16 to one in float32 by a cast copy of all of it, in new memory. On a busy core of an EPYC,
torch 2.13, billions of 2^24 elements a second with one thread, the fastest of twelve rounds: bfloat16 at once 0.09;
cast in blocks of 2^15 to 2^21 elements and then added 0.37, 0.48, 0.57, 0.68, 0.61, 0.49 and 0.53; float32 0.90.
"""

MOST_THREADS = 8
"""Ten bytes are moved for each element: more threads wait for the memory."""


class BlockSums:
    """Adds to sums, or sets them, in blocks that stay in the caches of the processor.

        sums = BlockSums()
        sums.add(total, values)

    Args:
        num_threads: By default those of torch, at most eight.

    Attributes:
        num_threads: In use.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        wanted = min(MOST_THREADS, torch.get_num_threads()) if num_threads is None else num_threads
        has_openmp: bool = torch.backends.openmp.is_available()  # type: ignore[no-untyped-call]
        self.num_threads = wanted if has_openmp else 1
        self._pool = _single_threads(self.num_threads) if self.num_threads > 1 else None
        self._scratch = [torch.empty(0) for _ in range(self.num_threads)]

    def add(self, total: Tensor, values: Tensor) -> None:
        """Add values of any dtype to a sum, 1-d, in place: the bits of ``total.add_(values)``."""
        self._run(self._add_part, total, values)

    def set(self, total: Tensor, values: Tensor) -> None:
        """Set a sum, 1-d, to values of any dtype, in place."""
        self._run(_set_part, total, values)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    def _run(self, part_of: Callable[[int, Tensor, Tensor], None], total: Tensor, values: Tensor) -> None:
        num_parts = min(self.num_threads, -(-len(total) // BLOCK))
        if self._pool is None or num_parts <= 1:
            part_of(0, total, values)
            return
        parts = zip(range(num_parts), total.chunk(num_parts), values.chunk(num_parts), strict=True)
        parts_done = [self._pool.submit(part_of, *part) for part in parts]
        wait(parts_done)  # also after an error: no thread writes to the sum afterwards
        for done in parts_done:
            done.result()

    def _add_part(self, number: int, total: Tensor, values: Tensor) -> None:
        """Add some of the values, with the scratch memory of one of the parts."""
        if values.dtype == total.dtype:
            total.add_(values)
            return
        scratch = self._scratch[number]
        step = min(len(total), BLOCK)
        if scratch.dtype != total.dtype or len(scratch) < step:
            scratch = self._scratch[number] = torch.empty(step, dtype=total.dtype)
        for start in range(0, len(total), step):
            part = total[start : start + step]
            part.add_(scratch[: len(part)].copy_(values[start : start + step]))


def _set_part(_: int, total: Tensor, values: Tensor) -> None:
    total.copy_(values)


def _single_threads(number: int) -> ThreadPoolExecutor:
    """Return a pool of threads in which torch uses one thread each; elsewhere it uses as many as before."""
    pool, all_started = ThreadPoolExecutor(number, thread_name_prefix="bigbatch-sums"), threading.Barrier(number)
    before = torch.get_num_threads()

    def start() -> None:
        torch.get_num_threads()  # a thread takes the number of the process over when it first asks for it
        torch.set_num_threads(1)  # of this thread, and of threads that ask later
        all_started.wait()

    for started in [pool.submit(start) for _ in range(number)]:
        started.result()
    torch.set_num_threads(before)
    return pool
