"""The command on several ranks with torchrun's environment: one forked process per rank, so that torch is loaded once.

    ranks = Launch(["train", …], size=2, folder=folder)      → codes = ranks.wait()
    ranks.stdout(0), ranks.stderr(1)                       stdout of rank 0, stderr of rank 1

The store lives in the test process, as in torchrun's agent. Real agents are tested in test_torchrun.py.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from support.gloo_processes import forking_context

LIMIT_S = 120.0

Patch = Callable[[int], None]
"""Called with the rank before the command; a module-level function or a partial of one."""


class Launch:
    """Processes of one run, all started in the constructor.

    Args:
        words: Arguments of the command.
        size: Number of processes.
        folder: Working directory; also receives the output files.
        patch: See `Patch`.
        restart: TORCHELASTIC_RESTART_COUNT, one value or one per rank (nodes can count differently).
        max_restarts: TORCHELASTIC_MAX_RESTARTS.
        local_size: Processes per node; all on one node by default.
        words_of: Arguments of ranks that differ from ``words``.
        alone: Run without torchrun's environment.
    """

    def __init__(
        self,
        words: Sequence[str],
        size: int,
        *,
        folder: Path,
        patch: Patch | None = None,
        restart: int | Sequence[int] = 0,
        max_restarts: int = 0,
        local_size: int | None = None,
        words_of: Mapping[int, Sequence[str]] | None = None,
        alone: bool = False,
    ) -> None:
        from torch.distributed import TCPStore

        self.folder = folder
        self.size = size
        self._store = None if alone else TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._number = len(list(folder.glob("out-*")))
        (folder / f"out-{self._number}").mkdir()
        context = forking_context()
        restarts = [restart] * size if isinstance(restart, int) else restart
        self.processes = []
        for rank in range(size):
            environment = {
                "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % (local_size or size),
                "LOCAL_WORLD_SIZE": local_size or size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._store.port,
                "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": restarts[rank],
                "TORCHELASTIC_MAX_RESTARTS": max_restarts, "TORCHELASTIC_USE_AGENT_STORE": "True",
                "GLOO_SOCKET_IFNAME": "lo",
            } if self._store is not None else {}  # fmt: skip
            given = (words_of or {}).get(rank, words)
            place = folder, self._out(rank), self._err(rank)
            for path in place[1:]:
                path.touch()  # also if it is killed before it opens them
            process = context.Process(
                target=_live, args=(list(given), {k: str(v) for k, v in environment.items()}, rank, patch, *place)
            )
            process.start()
            self.processes.append(process)

    def _out(self, rank: int) -> Path:
        return self.folder / f"out-{self._number}" / f"{rank}.out"

    def _err(self, rank: int) -> Path:
        return self.folder / f"out-{self._number}" / f"{rank}.err"

    def stdout(self, rank: int = 0) -> str:
        """Return the stdout of a rank."""
        return self._out(rank).read_text(encoding="utf-8")

    def stderr(self, rank: int = 0) -> str:
        """Return the stderr of a rank."""
        return self._err(rank).read_text(encoding="utf-8")

    def wait(self) -> list[int]:
        """Wait for all processes and return their exit codes; negative for a signal."""
        until = time.monotonic() + LIMIT_S
        for process in self.processes:
            process.join(max(0.1, until - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.close()
        everything = "\n".join(f"rank {rank}: {self.stderr(rank)}" for rank in range(self.size))
        assert not late, f"ranks {late} have not ended; {everything}"
        return [process.exitcode for process in self.processes]

    def wait_until(self, happened: Callable[[], Any]) -> None:
        """Wait until a condition holds; fail if a process exits first."""
        until = time.monotonic() + LIMIT_S
        while not happened():
            assert time.monotonic() < until, f"timed out waiting: {self.stderr()}"
            ended = [rank for rank, process in enumerate(self.processes) if not process.is_alive()]
            assert not ended or happened(), f"ranks {ended} have ended: {self.stderr(ended[0])}"
            self.processes[0].join(0.02)

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank."""
        os.kill(self.processes[rank].pid, number)

    def close(self) -> None:
        """Kill the processes that still run."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _live(
    words: list[str], environment: dict[str, str], rank: int, patch: Patch | None, folder: Path, out: Path, err: Path
) -> None:
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(environment)
    os.chdir(folder)
    import torch

    from bigbatch.cli import main
    from support import short_samples  # noqa: F401

    torch.set_num_threads(1)
    try:
        if patch is not None:
            patch(rank)
        code = main(words)
    except SystemExit as done:
        code = done.code
    except BaseException:  # noqa: BLE001 - printed as by the interpreter
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(words: Sequence[str], size: int, *, folder: Path, codes: int | list[int] = 0, **how: Any) -> Launch:
    """Run a command on ranks and assert its exit codes."""
    with Launch(words, size, folder=folder, **how) as launch:
        got = launch.wait()
    expected = [codes] * size if isinstance(codes, int) else codes
    everything = "\n".join(f"rank {rank}: {launch.stdout(rank)}{launch.stderr(rank)}" for rank in range(size))
    assert got == expected, f"{got}: {everything}"
    return launch
