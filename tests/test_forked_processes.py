"""Forks of the tests report their own exit codes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection, forkserver

import pytest

from support.forked_processes import ForkedProcess


def exit_with(code: int) -> int:
    """Return the exit code of the process."""
    return code


def test_two_threads_read_the_same_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """multiprocessing reads it from a pipe, where the second reader finds nothing, and calls that 255."""
    read, both = forkserver.read_signed, threading.Barrier(2)

    def late(descriptor: int) -> int:
        time.sleep(0.2)  # until another thread that may read has found the pipe readable, too
        return int(read(descriptor))

    def code(_: int) -> int | None:
        both.wait()
        return process.returncode

    with ForkedProcess(exit_with, 3) as process, ThreadPoolExecutor(2) as pool:
        connection.wait([process._process.sentinel])
        monkeypatch.setattr(forkserver, "read_signed", late)
        assert list(pool.map(code, range(2))) == [3, 3]
