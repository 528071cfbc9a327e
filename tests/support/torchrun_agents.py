"""Real torchrun agents in their own process group, with a fault injected into ranks before the first restart.

The agent and its ranks are forks of a process that has loaded torch; test_launchers.py starts new interpreters.
"""

import ctypes
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from support.forked_processes import ForkedProcess

LIMIT_S = 240
SCRIPT = """
import os, sys
from support import rank_faults, short_samples
from bigbatch.cli import main

rank, restart_count = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if restart_count == 0:
    {fault}
else:
    {later}
code = main(sys.argv[1:])
open(f"ended-{{restart_count}}-{{rank}}", "w").write(str(code))
sys.exit(code)
"""


@contextmanager
def torchrun(
    flags: Sequence[str], words: Sequence[str], folder: Path, *, fault: str = "pass", later: str = "pass"
) -> Iterator[ForkedProcess]:
    """Start torchrun with a fault injected into ranks before the command.

    Args:
        flags: Flags of torchrun.
        words: Arguments of bigbatch.
        folder: Working directory.
        fault: A Python statement that may use ``rank`` and ``rank_faults``, before the first restart.
        later: The same after a restart.
    """
    arguments = [*flags, _script(folder, fault, later), *words]
    with ForkedProcess(_run_agent, arguments, "lo", folder=folder) as process:
        try:
            yield process
        finally:
            _end(process)


def completed_torchrun(arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run torchrun with all of its arguments, and wait for it."""
    with ForkedProcess(_run_agent, list(arguments), "lo", folder=folder) as process:
        try:
            printed, complained = process.communicate(timeout=LIMIT_S)
        finally:
            _end(process)
        return subprocess.CompletedProcess(arguments, process.wait(), printed, complained)


@contextmanager
def forked_agent(
    flags: Sequence[str],
    words: Sequence[str],
    folder: Path,
    *,
    fault: str,
    log: Path,
    network_of: int,
    interface: str,
) -> Iterator[ForkedProcess]:
    """Start torchrun's agent in the network namespace of a process; a rank is a fork of the agent.

    Args:
        flags: Flags of torchrun.
        words: Arguments of bigbatch.
        folder: Working directory.
        fault: As for `torchrun`.
        log: File for stdout and stderr.
        network_of: Id of a process; its user namespace owns the network.
        interface: Network interface of gloo.
    """
    arguments = [*flags, _script(folder, fault, "pass"), *words]
    with ForkedProcess(_run_elsewhere, arguments, str(log), network_of, interface, folder=folder) as process:
        try:
            yield process
        finally:
            _end(process)


def _end(process: ForkedProcess) -> None:
    process.send_signal(signal.SIGTERM)  # the agent ends its ranks, which have their own process groups
    with suppress(subprocess.TimeoutExpired):
        process.wait(60)


def _script(folder: Path, fault: str, later: str) -> str:
    script = folder / f"script-{len(list(folder.glob('script-*')))}.py"
    script.write_text(SCRIPT.format(fault=fault, later=later), encoding="utf-8")
    return str(script)


def _run_elsewhere(arguments: list[str], log: str, network_of: int, interface: str) -> None:
    for kind, flag in (("user", 0x10000000), ("net", 0x40000000)):  # as nsenter does
        with Path(f"/proc/{network_of}/ns/{kind}").open("rb") as file:
            assert ctypes.CDLL(None).setns(file.fileno(), flag) == 0, kind
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    _run_agent(arguments, interface)


def _run_agent(arguments: list[str], interface: str) -> None:
    os.setsid()
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    SubprocessHandler._popen = lambda _, command, environment: _ForkedRank(command, environment)  # type: ignore[assignment, method-assign, return-value]
    run.main(arguments)


class _ForkedRank:
    """The part of `subprocess.Popen` that an agent uses, for a fork that runs a script."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _run_script([*command[command.index("-u") + 1 :]], environment)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int | None:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.02)
        return self.returncode


def _run_script(command: list[str], environment: dict[str, str]) -> NoReturn:
    code: Any = 1
    try:
        os.setsid()
        os.environ.update(environment)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # not the agent's handlers
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        is_module = command[0] == "-m"
        sys.argv = command[is_module:]
        run = runpy.run_module if is_module else runpy.run_path
        run(sys.argv[0], run_name="__main__")  # type: ignore[operator]
        code = 0
    except SystemExit as done:
        code = done.code
    except BaseException:  # noqa: BLE001 - printed as by the interpreter
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
