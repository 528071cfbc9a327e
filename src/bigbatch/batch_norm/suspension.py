"""Functions in threads of their own, of which one runs at a time, from one suspension to the next.

owner: advance(reply) → thread: runs until suspend(request) → owner: receives the request, or that the function ended

Every wait is for a flag that the other side sets before it wakes this one, and each flag is checked again after waking:
an interrupt may lose a wake-up, or leave one over, and neither makes a thread wait forever.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any
from weakref import finalize

from bigbatch.signal_deferral import DeferredSignals


class TaskEnded(BaseException):
    """Raised by `Task.suspend` in a function that is to end without a result."""


class Task:
    """A function that runs piece by piece, like a generator whose ``yield`` may stand at any depth.

        task = Task(lambda suspend: print(suspend("ready")))
        task.advance(worker)                # "ready"
        task.advance(worker, "go")          # prints "go"; None, the function ended

    Args:
        function: Receives `suspend`, whose requests are not None. Runs in the thread of a worker.

    Attributes:
        is_done: Whether the function ended.
    """

    def __init__(self, function: Callable[[Callable[[Any], Any]], None]) -> None:
        self._function: Callable[[Callable[[Any], Any]], None] | None = function
        self._request: Any = None
        self._reply: Any = None
        self._error: BaseException | None = None
        self._was_submitted = self._is_running = self._is_ending = False
        self._thread: int | None = None
        self.is_done = False
        self._wakes_thread: SimpleQueue[None] = SimpleQueue()
        self._wakes_owner: SimpleQueue[None] = SimpleQueue()

    def advance(self, worker: "Worker", reply: Any = None) -> Any:
        """Run the function until it suspends or ends; return its request, or None if it ended. Raises its errors.

        Args:
            worker: The same for each piece.
            reply: What the last `suspend` returns.
        """
        self._reply, self._request = reply, None
        if not self._was_submitted:
            worker.submit(self._run)  # waits: an interrupt before the next line leaves nothing that runs
            self._was_submitted = True
        self._is_running = True
        self._wakes_thread.put(None)
        while self._is_running:
            self._wakes_owner.get()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._request

    @property
    def is_in_its_thread(self) -> bool:
        """Whether this is called by the function: `suspend` in any other thread would wait forever."""
        return threading.get_ident() == self._thread

    def suspend(self, request: Any) -> Any:
        """Return the reply of the owner to a request. Called by the function, in its thread."""
        if not self._is_ending:
            self._request = request
            self._is_running = False
            self._wakes_owner.put(None)
            self._wait_for_owner()
        if self._is_ending:
            raise TaskEnded
        reply, self._reply = self._reply, None
        return reply

    def close(self) -> None:
        """End the function at its next suspension, and wait for it."""
        self._is_ending = True
        self._wakes_thread.put(None)
        while self._was_submitted and not self.is_done:
            self._wakes_owner.get()

    def _run(self) -> None:
        self._wait_for_owner()
        self._thread = threading.get_ident()
        function, self._function = self._function, None
        try:
            if not self._is_ending and function is not None:
                function(self.suspend)
        except TaskEnded:
            pass
        except BaseException as error:  # noqa: BLE001 - raised by the owner
            self._error = error
        finally:
            del function
            self.is_done, self._is_running = True, False
            self._wakes_owner.put(None)

    def _wait_for_owner(self) -> None:
        while not (self._is_running or self._is_ending):
            self._wakes_thread.get()


class Worker:
    """A thread that runs one function after another until it is stopped, or nobody refers to it."""

    def __init__(self) -> None:
        self._functions: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._functions,), name="bigbatch", daemon=True)
        self._stop = finalize(self, self._functions.put, None)

    def submit(self, function: Callable[[], None]) -> None:
        """Run a function, which handles its errors."""
        self._functions.put(function)
        if self._thread.ident is None:
            self._thread.start()

    def stop(self) -> None:
        """End the thread after the functions that were submitted."""
        self._stop()
        if self._thread.ident is not None:
            self._thread.join()


class Workers:
    """Threads by number, started when they are needed first.

    On CUDA they are kept from window to window: torch caches convolution plans for each thread, and handles of
    libraries.
    """

    def __init__(self) -> None:
        self._workers: list[Worker] = []

    def __getitem__(self, index: int) -> Worker:
        while index >= len(self._workers):
            self._workers.append(Worker())
        return self._workers[index]

    def stop(self) -> None:
        """End all threads."""
        with DeferredSignals() as deferred, deferred:
            while self._workers:
                self._workers.pop().stop()


def _serve(functions: "SimpleQueue[Callable[[], None] | None]") -> None:
    while (function := functions.get()) is not None:
        function()
        del function  # what it refers to is not kept while waiting for the next one
