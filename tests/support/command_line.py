"""The real command in a subprocess without a terminal or input, in its own working directory."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SENTENCE = re.compile(
    r"bigbatch (train|resume|verify|plan|generate|merge|checkpoints|advise|report|bench|inspect|diff): [^\n]+[.?]\n"
)
LIMIT_S = 120


def command(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ``bigbatch WORDS`` in ``folder``, and wait for it."""
    return subprocess.run(
        [sys.executable, "-m", "bigbatch", *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


@contextmanager
def running(*words: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run ``bigbatch WORDS`` in ``folder`` in the background, with SIGINT handled as in a terminal."""
    start = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"  # a background job ignores it
        "from bigbatch.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", start, *words],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


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
