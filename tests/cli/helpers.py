"""The real command in a process of its own: no terminal, no input, its own folder."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SENTENCE = re.compile(r"bigbatch (train|resume|verify|plan|generate|checkpoints|advise|report|bench): [^\n]+[.?]\n")
LIMIT_S = 120


def command(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ``bigbatch WORDS`` in ``folder``, to its end."""
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
    """Run ``bigbatch WORDS`` in ``folder`` beside the test, which gets its SIGINT like one in a terminal would."""
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
    """Every file and folder below ``folder``."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
