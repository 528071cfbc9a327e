"""A script for test_writer_crash.py: runs an action on copies of a folder and kills each at another disk operation.

    python -m lm.checkpoint.writer_crash_script ROOT/ACTION/template …
    →   for each point: a folder ROOT/ACTION/n, and a line "folder point"

The points are all disk operations; a write is interrupted in its middle, a sync before and after. Each process is
forked, so that torch is loaded once, and killed with SIGKILL. The last line of an action is of one that survived.
"""

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from bigbatch.lm.checkpoint import prune
from bigbatch.lm.checkpoint.hashed_file import HashedFile
from support.checkpoints import RUN_ID, DiskOperations, save

ACTIONS = {
    "write": lambda folder: save(folder, 2),
    "replace": lambda folder: save(folder, 2),
    "prune": lambda folder: prune(folder, keep=1, run_id=RUN_ID),
}


def die(point: str) -> None:
    os.write(1, f"{point}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)


def do(action: str, folder: Path, number: int) -> None:
    patch = pytest.MonkeyPatch()
    points = DiskOperations(patch, die, at=number)
    counted, fsync = HashedFile.write, os.fsync

    def write_half(file: HashedFile, data: Any) -> None:
        file._file.write(data[: len(data) // 2])  # a killed process stops here; others overwrite it
        file._file.flush()
        file._file.seek(-(len(data) // 2), os.SEEK_CUR)
        counted(file, data)

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        points.reach("after fsync")

    patch.setattr(HashedFile, "write", write_half)
    patch.setattr(os, "fsync", sync)
    ACTIONS[action](folder)


def kill_everywhere(template: Path) -> None:
    for number in itertools.count():
        folder = shutil.copytree(template, template.with_name(str(number)))
        os.write(1, f"{folder} ".encode())
        child = os.fork()
        if child == 0:
            status = 1
            try:
                do(template.parent.name, folder, number)
                status = 0
            finally:
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        if ended == 0:
            os.write(1, b"lived\n")
            return
        assert os.WIFSIGNALED(ended), "the action failed by itself"


if __name__ == "__main__":
    for template in sys.argv[1:]:
        kill_everywhere(Path(template))
