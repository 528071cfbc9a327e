"""Real torchrun agents in their own process group, with a fault injected into ranks before the first restart."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

LIMIT_S = 240
SCRIPT = """
import os, sys
from support import rank_faults, short_samples
from bigbatch.cli import main

rank, restart_count = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if restart_count == 0:
    {fault}
code = main(sys.argv[1:])
open(f"ended-{{restart_count}}-{{rank}}", "w").write(str(code))
sys.exit(code)
"""
ROOT = Path(__file__).parents[2]


@contextmanager
def torchrun(
    flags: Sequence[str],
    words: Sequence[str],
    folder: Path,
    *,
    fault: str = "pass",
    inside: Sequence[str] = (),
    log: Path | None = None,
    interface: str = "lo",
) -> Iterator[Any]:
    """Start torchrun with a fault injected into ranks before the command, unless restarted.

    Args:
        flags: Flags of torchrun.
        words: Arguments of bigbatch.
        folder: Working directory.
        fault: A Python statement that may use ``rank`` and ``rank_faults``.
        inside: A prefix command, e.g. nsenter.
        log: File for stdout and stderr; pipes by default.
        interface: Network interface of gloo.
    """
    script = folder / f"script-{len(list(folder.glob('script-*')))}.py"
    script.write_text(SCRIPT.format(fault=fault), encoding="utf-8")
    places = os.pathsep.join(map(str, (ROOT / "tests", ROOT / "src")))
    with ExitStack() as stack:
        out = subprocess.PIPE if log is None else stack.enter_context(log.open("w"))
        process = subprocess.Popen(
            [*inside, sys.executable, "-m", "torch.distributed.run", *flags, str(script), *words],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": places, "PYTHONUNBUFFERED": "1", "GLOO_SOCKET_IFNAME": interface},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.PIPE if log is None else subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()  # workers have their own process groups and are ended by the agent
                try:
                    process.communicate(timeout=60)
                except subprocess.TimeoutExpired:
                    process.kill()
            process.communicate()


def run_torchrun(*how: Any, **more: Any) -> tuple[int, str, str]:
    with torchrun(*how, **more) as process:
        printed, complained = process.communicate(timeout=LIMIT_S)
        return process.returncode, printed, complained


def wait_for(process: Any, happened: Callable[[], Any]) -> None:
    until = time.monotonic() + LIMIT_S
    while not happened():
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        with suppress(subprocess.TimeoutExpired):  # ended: the next turn shows what it printed
            process.wait(0.05)
