"""Additions to sums in host memory, by several threads of one process.

    sum, gradient → equal parts → each thread casts and adds a block at a time, while it is in its cache

The additions are those of numpy. It releases the lock of the interpreter once for each block, and torch several times:
next to an H200 (16 cores, torch 2.11), 8 threads added 5.5 billions of elements in bfloat16 a second with numpy, 2.1
with torch. The threads of OpenMP, which torch would use for one tensor, added 4.7 to 9.2 alone, but 2.0 while another
thread ran backward: each of their operations ends when the slowest thread does.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

try:
    import numpy as np
except ImportError:  # torch works without it
    np = None  # type: ignore[assignment]

BLOCK = 2**17
"""Elements that are cast and then added, while they are in the cache of a core: 512 KiB in float32.

Torch adds a tensor in bfloat16 to one in float32 by a cast copy of all of it, in new memory. On a busy core of an EPYC,
torch 2.13, billions of 2^24 elements a second with one thread, the fastest of twelve rounds: bfloat16 at once 0.09;
cast in blocks of 2^15 to 2^21 elements and then added 0.37, 0.48, 0.57, 0.68, 0.61, 0.49 and 0.53; float32 0.90.
"""

MOST_THREADS = 8
"""Ten bytes are moved for each element: more threads wait for the memory."""

_DTYPES = {torch.float32, torch.bfloat16}


class BlockSums:
    """Adds to sums, or sets them, in blocks that stay in the caches of the processor.

        sums = BlockSums()
        sums.add(total, values)

    Sums in float32 and values in float32 or bfloat16 are divided among threads; others are added by torch.

    Args:
        num_threads: By default those of torch, at most eight.

    Attributes:
        num_threads: In use; 1 without numpy.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        wanted = min(MOST_THREADS, torch.get_num_threads()) if num_threads is None else num_threads
        self.num_threads = 1 if np is None else wanted
        self._pool = ThreadPoolExecutor(self.num_threads, "bigbatch-sums") if self.num_threads > 1 else None
        self._scratch = threading.local()

    def add(self, total: Tensor, values: Tensor) -> None:
        """Add values of any dtype to a sum, 1-d and contiguous, in place: the bits of ``total.add_(values)``."""
        if self._is_for_numpy(total, values):
            self._run(self._add_part, total, values)
        else:
            _add_with_torch(total, values)

    def set(self, total: Tensor, values: Tensor) -> None:
        """Set a sum, 1-d and contiguous, to values of any dtype, in place."""
        if self._is_for_numpy(total, values):
            self._run(_set_part, total, values)
        else:
            total.copy_(values)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    @staticmethod
    def _is_for_numpy(total: Tensor, values: Tensor) -> bool:
        return np is not None and total.dtype is torch.float32 and values.dtype in _DTYPES

    def _run(self, part_of: Callable[[Any, Any], None], total: Tensor, values: Tensor) -> None:
        """Call a function for equal parts of two tensors, as arrays, each in a thread of its own."""
        whole = _array_of(total), _array_of(values)
        num_parts = min(self.num_threads, -(-len(total) // BLOCK))
        if self._pool is None or num_parts <= 1:
            part_of(*whole)
            return
        step = -(-len(total) // num_parts)
        starts = range(0, len(total), step)
        done = [self._pool.submit(part_of, *(array[start : start + step] for array in whole)) for start in starts]
        wait(done)  # also after an error: no thread writes to the sum afterwards
        for part in done:
            part.result()

    def _add_part(self, total: Any, values: Any) -> None:
        with np.errstate(all="ignore"):  # infinity and NaN are added as by torch; the window finds them in the norm
            self._add_blocks(total, values)

    def _add_blocks(self, total: Any, values: Any) -> None:
        if values.dtype == total.dtype:
            np.add(total, values, out=total)
            return
        scratch = getattr(self._scratch, "array", None)
        if scratch is None:
            scratch = self._scratch.array = np.empty(BLOCK, dtype=np.uint32)
        for start in range(0, len(total), BLOCK):
            block = total[start : start + BLOCK]
            wide = scratch[: len(block)]
            _widen(values[start : start + BLOCK], wide)
            np.add(block, wide.view(np.float32), out=block)


def _set_part(total: Any, values: Any) -> None:
    if values.dtype == total.dtype:
        np.copyto(total, values)
    else:
        _widen(values, total.view(np.uint32))


def _widen(values: Any, wide: Any) -> None:
    """Write the bits of bfloat16 values, uint16, as those of float32, uint32: they are the upper half."""
    np.left_shift(values, 16, out=wide, dtype=np.uint32, casting="unsafe")


def _array_of(tensor: Tensor) -> Any:
    """Return the memory of a tensor as an array: float32, or the bits of bfloat16 as uint16."""
    if tensor.dtype is torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(np.uint16)
    return tensor.detach().numpy()


def _add_with_torch(total: Tensor, values: Tensor) -> None:
    if values.dtype == total.dtype:
        total.add_(values)
        return
    for start in range(0, len(total), BLOCK):
        part = slice(start, start + BLOCK)
        total[part].add_(values[part].to(total.dtype))
