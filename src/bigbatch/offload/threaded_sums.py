"""Additions to sums in host memory, by several threads of one process.

    sum, gradient → equal parts → each thread adds one

The additions are those of numpy, which releases the lock of the interpreter once for each part. Threads that took it
for every block of 2^17 elements, to cast them from bfloat16, reached half of their speed while another thread ran
backward; so did those of OpenMP, which torch would use for one tensor: each of their operations ends when the slowest
thread does. Gradients are therefore cast on the device before they are copied.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

try:
    import numpy as np
except ImportError:  # torch works without it
    np = None  # type: ignore[assignment]

SMALLEST_PART = 2**17
"""Elements for which another thread is worth its start."""

MOST_THREADS = 16
"""Twelve bytes are moved for each element, and one core moves no more than 8 GB/s of them: next to an H200, 8 threads
added 5.0 billions of elements in float32 a second, and 16 threads of OpenMP 10.8."""


class ThreadedSums:
    """Adds to sums, or sets them, in parts that threads share.

        sums = ThreadedSums()
        sums.add(total, values)

    Tensors in float32 are divided among threads; others are added by torch.

    Args:
        num_threads: By default those of torch, at most 16.

    Attributes:
        num_threads: In use; 1 without numpy.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        wanted = min(MOST_THREADS, torch.get_num_threads()) if num_threads is None else num_threads
        self.num_threads = 1 if np is None else wanted
        self._pool = ThreadPoolExecutor(self.num_threads, "bigbatch-sums") if self.num_threads > 1 else None

    def add(self, total: Tensor, values: Tensor) -> None:
        """Add values to a sum of their dtype, 1-d and contiguous, in place: the bits of ``total.add_(values)``."""
        if self._is_for_numpy(total):
            self._run(_add_part, total, values)
        else:
            total.add_(values)

    def set(self, total: Tensor, values: Tensor) -> None:
        """Set a sum, 1-d and contiguous, to values of its dtype, in place."""
        if self._is_for_numpy(total):
            self._run(_set_part, total, values)
        else:
            total.copy_(values)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    @staticmethod
    def _is_for_numpy(total: Tensor) -> bool:
        return np is not None and total.dtype is torch.float32

    def _run(self, part_of: Callable[[Any, Any], None], total: Tensor, values: Tensor) -> None:
        """Call a function for equal parts of two tensors, as arrays, each in a thread of its own."""
        whole = total.detach().numpy(), values.detach().numpy()
        num_parts = min(self.num_threads, -(-len(total) // SMALLEST_PART))
        if self._pool is None or num_parts <= 1:
            part_of(*whole)
            return
        step = -(-len(total) // num_parts)
        starts = range(0, len(total), step)
        done = [self._pool.submit(part_of, *(array[start : start + step] for array in whole)) for start in starts]
        wait(done)  # also after an error: no thread writes to the sum afterwards
        for part in done:
            part.result()


def _add_part(total: Any, values: Any) -> None:
    with np.errstate(all="ignore"):  # infinity and NaN are added as by torch; the window finds them in the norm
        np.add(total, values, out=total)


def _set_part(total: Any, values: Any) -> None:
    np.copyto(total, values)
