"""Commands and scripts in forks of a process that has imported torch and transformers: 0.1 s of CPU time, not 7 s.

    with ForkedProcess(main, ["train", …], folder=folder) as process:      a function and its arguments
        process.send_signal(signal.SIGINT)
        printed, complained = process.communicate()

The interface is that of `subprocess.Popen` with pipes. A fork has the streams, the environment, the working directory
and the exit code of a new process. What differs is what an import does: test that in a new interpreter.
"""

import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any, TextIO

from support.gloo_processes import forking_context

LIMIT_S = 240

_reading = threading.Lock()
"""An exit code is read once from a pipe, and starting a process reads those of all others: two threads that read the
same one, as a page with a pool of threads does, would find the pipe closed, which multiprocessing reports as 255."""


class ForkedProcess:
    """A function in a forked process, with pipes for stdout and stderr.

    Args:
        function: A module-level function; its result is the exit code.
        arguments: Its arguments.
        folder: Working directory.
        stdin: Descriptor of the input; without one, the input is empty.
    """

    def __init__(
        self, function: Callable[..., Any], *arguments: Any, folder: Path | None = None, stdin: int | None = None
    ) -> None:
        context = forking_context()
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        source = Connection(os.open(os.devnull, os.O_RDONLY) if stdin is None else os.dup(stdin))
        streams = [source, *(end for _, end in pipes)]
        place = os.environ.copy(), str(folder or Path.cwd())
        self._process = context.Process(target=_live, args=(streams, place, function, arguments))
        with _reading:
            self._process.start()
        for stream in streams:
            stream.close()
        self.stdout, self.stderr = (_text_of(ours) for ours, _ in pipes)

    @property
    def pid(self) -> int:
        """Return the process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Return the exit code, negative for a signal; None while the process runs."""
        with _reading:
            return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code; None while the process runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code.

        Raises:
            TimeoutExpired: The process still runs after ``timeout`` seconds.
        """
        wait_for_any([self._process.sentinel], timeout)
        code = self.returncode
        if code is None:
            raise TimeoutExpired(str(self._process), timeout or 0.0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end and return what was printed to stdout and stderr and not read before.

        Raises:
            TimeoutExpired: The process still runs after ``timeout`` seconds.
        """
        texts = ["", ""]

        def read(number: int, stream: TextIO) -> None:
            texts[number] = "" if stream.closed else stream.read()

        readers = [threading.Thread(target=read, args=pair) for pair in enumerate((self.stdout, self.stderr))]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process."""
        with _reading:  # which asks first whether it runs
            self._process.kill()

    def __enter__(self) -> "ForkedProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()
        self.stdout.close()
        self.stderr.close()


def wait_for(process: ForkedProcess, happened: Callable[[], Any]) -> None:
    """Wait until something has happened; fail if the process ends first."""
    until_s = time.monotonic() + LIMIT_S
    while not happened():
        assert time.monotonic() < until_s
        assert process.poll() is None, process.communicate()
        with suppress(TimeoutExpired):  # ended: the next turn shows what it printed
            process.wait(0.02)


def bigbatch(*words: str) -> int:
    """Run the command."""
    from bigbatch.cli import main

    return main(list(words))


def patched(patch: Callable[[int], None], *words: str) -> int:
    """Apply a patch of `support.rank_faults` to the only process of a run, and run the command."""
    patch(0)
    return bigbatch(*words)


def script(code: str, *words: str) -> None:
    """Run the code as ``python -c`` does."""
    sys.argv = ["-c", *words]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def module(name: str, *words: str) -> None:
    """Run a module of the tests as ``python -m`` does."""
    sys.argv = [name, *words]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _text_of(connection: Connection) -> TextIO:
    with connection:
        return os.fdopen(os.dup(connection.fileno()), encoding="utf-8")


def _live(streams: list[Connection], place: tuple[dict[str, str], str], function: Any, arguments: Any) -> None:
    """Take over the streams, the environment and the working directory, and call the function."""
    import numpy as np

    environment, folder = place
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, stream in enumerate(streams):
        os.dup2(stream.fileno(), descriptor)
        stream.close()
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, also if pytest runs in the background
    np.random.seed()  # forks would share its state; Python's own generator is seeded after a fork
    sys.exit(function(*arguments))
