"""The real command in its own process without a terminal or input, in its own working directory."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.forked_processes import ForkedProcess, bigbatch, patched

SENTENCE = re.compile(
    r"bigbatch (train|resume|verify|plan|generate|merge|checkpoints|advise|report|bench|inspect|diff): [^\n]+[.?]\n"
)
LIMIT_S = 120


def command(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ``bigbatch WORDS`` in ``folder``, and wait for it."""
    return completed(bigbatch, *words, folder=folder)


def completed(
    function: Callable[..., object], *words: str, folder: Path, timeout_s: float = LIMIT_S
) -> subprocess.CompletedProcess[str]:
    """Run a function in a forked process, and wait for it."""
    with ForkedProcess(function, *words, folder=folder) as process:
        printed, complained = process.communicate(timeout=timeout_s)
        assert process.returncode is not None
        return subprocess.CompletedProcess(words, process.returncode, printed, complained)


def cold_command(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ``bigbatch WORDS`` in ``folder`` in a new interpreter, and wait for it."""
    return subprocess.run(
        [sys.executable, "-m", "bigbatch", *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def running(*words: str, folder: Path, patch: Callable[[int], None] | None = None) -> ForkedProcess:
    """Run ``bigbatch WORDS`` in ``folder`` in the background, with SIGINT handled as in a terminal.

    Args:
        words: Arguments of the command.
        folder: Working directory.
        patch: Applied before the command, with 0 as the rank; see `support.rank_faults`.
    """
    if patch is None:
        return ForkedProcess(bigbatch, *words, folder=folder)
    return ForkedProcess(patched, patch, *words, folder=folder)


def files_below(folder: Path) -> set[str]:
    """Return every file and folder below ``folder``, as relative paths."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def pretend_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Make the command believe that it prints to a terminal of that width, without colours."""
    for name, value in {"COLUMNS": str(columns), "TTY_COMPATIBLE": "1", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)


def terminal_lines(printed: str) -> list[str]:
    """Return the lines that a terminal shows, also those that are overwritten later, without escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed).replace("\r", "\n").splitlines()
