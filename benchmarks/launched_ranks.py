"""Commands of bigbatch on one or several ranks, started by torchrun, for benchmarks that kill them."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PATIENCE_S = 400


def launch(
    size: int,
    words: list[str],
    log: Path,
    *,
    restarts: int = 0,
    environment: Mapping[str, str] | None = None,
    command: Sequence[str] = ("-m", "bigbatch"),
) -> subprocess.Popen[bytes]:
    """Start one process, or torchrun with several; their output is appended to a file."""
    rest = [*command, *words]
    if size > 1:
        ranks = ["--standalone", "--nproc-per-node", str(size), "--max-restarts", str(restarts)]
        rest = ["-m", "torch.distributed.run", *ranks, *rest]
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *rest], stdout=file, stderr=file, env={**os.environ, **(environment or {})}
        )


def ranks_of(agent: int) -> list[int]:
    """Return the processes that an agent of torchrun has started as ranks, in the order of their numbers."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            environment = stat.with_name("environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue  # has ended
        rank = next((int(line[5:]) for line in environment if line.startswith(b"RANK=")), None)
        if parent == agent and rank is not None:
            found.append((rank, int(stat.parent.name)))
    return [process for _, process in sorted(found)]


def kill_rank(process: subprocess.Popen[bytes], rank: int) -> None:
    """Kill one rank, or the process itself if there are none; a process that has ended is left alone."""
    processes = ranks_of(process.pid) or [process.pid]
    if process.poll() is None:
        os.kill(processes[rank % len(processes)], signal.SIGKILL)


def end_all(process: subprocess.Popen[bytes]) -> None:
    """Kill an agent and its ranks."""
    for each in [process.pid, *ranks_of(process.pid)]:
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def updates(out: Path) -> int:
    """Return the number of updates that a run has recorded."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], *, poll_s: float = 0.02) -> bool:
    """Wait until a condition holds; return whether it did before the process ended."""
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        if process.poll() is not None or time.monotonic() > end_s:
            return condition()
        time.sleep(poll_s)
    return True


def wait_for_end(process: subprocess.Popen[bytes], log: Path) -> str | None:
    """Wait until a process ends; return what went wrong."""
    try:
        code = process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        end_all(process)
        return f"no end after {PATIENCE_S} s: {last_line(log)}"
    return None if code == 0 else f"exit code {code}: {last_line(log)}"


def last_line(log: Path) -> str:
    """Return the last message of a command in its output."""
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    return next((line for line in reversed(lines) if re.match(r"bigbatch \w+: ", line)), lines[-1])
