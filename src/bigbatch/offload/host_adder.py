"""Gradients that are copied from the device and added to sums in host memory, by threads, while backward continues.

    gradient ──cast to the dtype of the sum, copy──▶ staging memory ──add──▶ sum

The device is never waited for by the thread that runs backward, except when all of the staging memory is in use. A
gradient in bfloat16 is cast on the device: twice the bytes cross the link, and the host added 3.0 billions of elements
a second beside a backward, where casts on the host left it 2.2 (`benchmarks/offload.py`, an H200 with 16 cores).
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import finalize

from torch import Tensor

from bigbatch.errors import WindowStateError, first_line
from bigbatch.offload.chunk_sizes import NUM_SLOTS, STAGING_BYTES
from bigbatch.offload.threaded_sums import ThreadedSums
from bigbatch.offload.transfers import Transfers

_ALIGNMENT = 256


@dataclass
class _Piece:
    """A part of a gradient on its way to its sum.

    Attributes:
        total: Part of the sum, 1-d.
        staged: The same part of the gradient, in staging memory.
        gradient: On the device, in the dtype of the sum; its memory is in use until the copy has ended.
        copy: What to wait for.
        replaces: Whether it is the first gradient of the window.
        num_bytes: Staging memory that is free afterwards.
    """

    total: Tensor
    staged: Tensor
    gradient: Tensor
    copy: Any
    replaces: bool
    num_bytes: int


class HostAdder:
    """Adds gradients to sums in host memory, in the order in which they are passed.

        adder = HostAdder(transfers)
        adder.add(total, gradient, replaces=False)      # returns before anything is copied
        adder.wait()                                    # all are added

    Args:
        transfers: Copy from the device.
        staging_bytes: Host memory that gradients pass through, in pieces of at most a third of it; by default 192 MiB.

    Attributes:
        staging_bytes: As passed.
    """

    def __init__(self, transfers: Transfers, staging_bytes: int | None = None) -> None:
        self._transfers = transfers
        self.staging_bytes = STAGING_BYTES if staging_bytes is None else staging_bytes
        self._memory: Tensor | None = None
        self._work = _Work(transfers.wait)
        self._turn = threading.Lock()  # backwards may run in several threads
        self._stop: Callable[[], object] = lambda: None

    @property
    def host_bytes(self) -> int:
        """Staging memory that is allocated."""
        return 0 if self._memory is None else self._memory.nbytes

    def prepare(self) -> None:
        """Allocate the staging memory, and start the thread; no-op afterwards.

        Raises:
            MemoryLimitError: The host has too little memory.
        """
        if self._memory is not None:
            return
        self._memory = self._transfers.host_memory(self.staging_bytes)
        self._work.prepare(self.staging_bytes)
        thread = threading.Thread(target=self._work.run, name="bigbatch-host-adder", daemon=True)
        thread.start()
        self._stop = finalize(self, self._work.stop, thread)

    def add(self, total: Tensor, gradient: Tensor, *, replaces: bool) -> None:
        """Start to copy a gradient, which is then added to a sum, or replaces it.

        Args:
            total: In host memory, contiguous, 1-d.
            gradient: On the device, contiguous, 1-d, of the same size; any dtype.
            replaces: Whether the sum has no value yet.

        Raises:
            RuntimeError: A copy cannot be started. Nothing of this gradient is added.
            WindowStateError: The same, after a part of the gradient was added; or an earlier addition failed.
        """
        step = max(1, self.staging_bytes // NUM_SLOTS // total.element_size())
        with self._turn:
            for start in range(0, gradient.numel(), step):
                try:
                    self._send(total[start : start + step], gradient[start : start + step], replaces=replaces)
                except BaseException as error:
                    self._work.cancel()
                    if not start:
                        raise
                    self._work.error = self._work.error or error  # no part of the sum is used
                    if not isinstance(error, RuntimeError):
                        raise
                    self._work.check()

    def _send(self, total: Tensor, part: Tensor, *, replaces: bool) -> None:
        """Copy a part of a gradient, and let it be added."""
        assert self._memory is not None, "prepare was called"
        start, num_bytes = self._work.reserve(total.nbytes)
        part = part.to(total.dtype)  # only now: at most as much of it is on the device as there is staging memory
        staged = self._memory[start : start + part.nbytes].view(part.dtype)
        copy = self._transfers.to_host(staged, part)
        self._work.submit(_Piece(total, staged, part, copy, replaces, num_bytes))

    def wait(self) -> None:
        """Wait until everything is added.

        Raises:
            WindowStateError: A copy or an addition failed.
        """
        self._work.wait_idle()
        self._work.check()

    def discard(self) -> None:
        """Wait until nothing is in progress, and forget errors: the sums are dropped."""
        self._work.wait_idle()
        self._work.reset()


class _Work:
    """Pieces in progress, and the staging memory that they use in turn; shared by two threads.

    Memory is used in a circle: from ``_head`` on, up to what the oldest piece uses.
    """

    def __init__(self, wait_for: Callable[[Any], None]) -> None:
        self.capacity = 0
        self.error: BaseException | None = None
        self._wait_for = wait_for
        self._changed = threading.Condition()
        self._pieces: deque[_Piece | None] = deque()
        self._head = self._used = self._reserved = 0
        self._sums = ThreadedSums(1)

    def prepare(self, capacity: int) -> None:
        """Use so much staging memory, and start the threads that add."""
        self.capacity, self._sums = capacity, ThreadedSums()

    def reserve(self, num_bytes: int) -> tuple[int, int]:
        """Return the start of free staging memory, and what it occupies; wait until there is some."""
        num_bytes = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        with self._changed:
            while True:
                self.check()
                if not self._used:
                    self._head = 0
                wraps = self._head + num_bytes > self.capacity
                skipped = self.capacity - self._head if wraps else 0
                if self._used + skipped + num_bytes <= self.capacity:
                    break
                self._changed.wait()
            start = 0 if wraps else self._head
            self._reserved = skipped + num_bytes
            self._used += self._reserved
            self._head = start + num_bytes
            return start, self._reserved

    def cancel(self) -> None:
        """Free what was reserved last, if nothing was submitted for it."""
        with self._changed:
            self._used -= self._reserved
            self._head = (self._head - self._reserved) % self.capacity
            self._reserved = 0

    def submit(self, piece: _Piece) -> None:
        """Let the thread add a piece."""
        with self._changed:
            self._reserved = 0
            self._pieces.append(piece)
            self._changed.notify_all()

    def check(self) -> None:
        """Raise if an addition has failed."""
        if self.error is not None:
            reason = first_line(self.error) or type(self.error).__name__
            raise WindowStateError(
                f"a gradient was not added to its sum in host memory ({reason}), and the window has changed nothing: "
                "run it again."
            ) from self.error

    def wait_idle(self) -> None:
        """Wait until no piece is in progress."""
        with self._changed:
            while self._used - self._reserved:
                self._changed.wait()

    def reset(self) -> None:
        """Forget errors, and let all of the staging memory be free; nothing is in progress."""
        with self._changed:
            self.error = None
            self._head = self._used = self._reserved = 0

    def stop(self, thread: threading.Thread) -> None:
        """End the thread after what it has to do."""
        with self._changed:
            self._pieces.append(None)
            self._changed.notify_all()
        if thread is not threading.current_thread():
            thread.join()

    def run(self) -> None:
        """Add pieces until `stop`."""
        while True:
            with self._changed:
                while not self._pieces:
                    self._changed.wait()
                piece = self._pieces.popleft()
            if piece is None:
                self._sums.close()
                return
            try:
                self._wait_for(piece.copy)
                if self.error is None:
                    if piece.replaces:
                        self._sums.set(piece.total, piece.staged)
                    else:
                        self._sums.add(piece.total, piece.staged)
            except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
                self.error = self.error or error
            num_bytes = piece.num_bytes
            del piece  # the memory of the gradient is free before its staging memory is
            with self._changed:
                self._used -= num_bytes
                self._changed.notify_all()
