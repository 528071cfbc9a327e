"""Defer SIGINT and SIGTERM while an update is being applied."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

DEFERRED = (signal.SIGINT, signal.SIGTERM)


class DeferredSignals:
    """Context in which SIGINT and SIGTERM do not interrupt: their handlers run when it ends.

        with DeferredSignals():
            optimizer.step()

    Entered twice, handlers are restored even if the first exit is interrupted, as by a debugger:

        with DeferredSignals() as deferred, deferred:
            optimizer.step()

    No-op outside the main thread, where Python runs no signal handlers, and for signals that are ignored or that are
    handled outside Python.
    """

    def __init__(self) -> None:
        self._handlers: dict[signal.Signals, Any] = {}  # to be restored
        self._originals: dict[signal.Signals, Any] = {}
        self._received: list[signal.Signals] = []

    def __enter__(self) -> "DeferredSignals":
        if self._handlers or threading.current_thread() is not threading.main_thread():
            return self
        try:
            for number in DEFERRED:
                handler = signal.getsignal(number)
                if handler is not None and handler != signal.SIG_IGN:
                    self._handlers[number] = self._originals[number] = handler
                    signal.signal(number, self._note)
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._restore()
        finally:
            self._deliver()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._received.append(signal.Signals(number))

    def _restore(self) -> None:
        try:
            while self._handlers:
                number, handler = next(iter(self._handlers.items()))
                signal.signal(number, handler)
                del self._handlers[number]
        finally:
            if self._handlers:  # a restored handler has raised: the others must not stay deferred
                self._restore()

    def _deliver(self) -> None:
        received, self._received = self._received, []
        for number in dict.fromkeys(received):
            handler = self._originals[number]
            if callable(handler):
                handler(number, sys._getframe())
            else:
                signal.raise_signal(number)  # the default action
