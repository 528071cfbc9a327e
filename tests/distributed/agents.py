"""torchrun in a process group of its own, with ranks that meet some trouble in their first life."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

LIMIT_S = 240
SCRIPT = """
import os, sys
from tests.distributed import trouble
from bigbatch.cli import main

rank, again = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if not again:
    {trouble}
code = main(sys.argv[1:])
open(f"ended-{{again}}-{{rank}}", "w").write(str(code))
sys.exit(code)
"""
ROOT = Path(__file__).parents[2]


@contextmanager
def torchrun(
    flags: Sequence[str],
    words: Sequence[str],
    folder: Path,
    *,
    trouble: str = "pass",
    inside: Sequence[str] = (),
    log: Path | None = None,
    interface: str = "lo",
) -> Iterator[Any]:
    """Start ranks, each of which meets some trouble before its first command.

    Args:
        flags: Of torchrun.
        words: Of bigbatch.
        folder: Where they run.
        trouble: A statement about ``rank``.
        inside: A command that runs it elsewhere.
        log: Receives all that is printed; by default pipes do.
        interface: Of the network, by which ranks find one another.
    """
    script = folder / f"script-{len(list(folder.glob('script-*')))}.py"
    script.write_text(SCRIPT.format(trouble=trouble), encoding="utf-8")
    places = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "src")))
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
                process.terminate()  # its workers are in groups of their own, and end by it alone
                try:
                    process.communicate(timeout=60)
                except subprocess.TimeoutExpired:
                    process.kill()
            process.communicate()


def torchrun_to_its_end(*how: Any, **more: Any) -> tuple[int, str, str]:
    with torchrun(*how, **more) as process:
        printed, complained = process.communicate(timeout=LIMIT_S)
        return process.returncode, printed, complained


def wait_for(process: Any, happened: Callable[[], Any]) -> None:
    until = time.monotonic() + LIMIT_S
    while not happened():
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
