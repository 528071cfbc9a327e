"""A script for test_sharded_faults.py: two ranks write to copies of a folder, one is killed, each at another point.

    python -m lm.checkpoint.sharded_crash_script ROOT/RANK/template RANK
    →   for each point a line of JSON: the point, the error of the other rank, and a folder with what was left (left/)
    and, of every third, the result of the next write (next/)

The ranks are forked, so that torch is loaded once.
"""

import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bigbatch.lm.checkpoint.hashed_file import HashedFile
from bigbatch.lm.checkpoint.sharded_writer import write_sharded
from lm.checkpoint.sharded_faults_cases import error_of, save, shards_of
from support.checkpoints import RUN_ID, DiskOperations, values_of

LIMIT_S = 60


def write(folder: Path, rank: int, notes: Path, kill_at: int | None) -> None:
    """Write step-2 as one of two ranks; note the point of the kill or the error."""
    patch = pytest.MonkeyPatch()
    tensors = shards_of(2)
    if kill_at is not None:
        points = DiskOperations(patch, lambda point: die(notes, point), at=kill_at)
        fsync = os.fsync

        def sync(descriptor: int) -> None:
            fsync(descriptor)
            points.reach("after fsync")

        def write_half(file: HashedFile, data: Any, counted: Callable[..., None] = HashedFile.write) -> None:
            file._file.write(data[: len(data) // 2])  # a killed process stops here; others overwrite it
            file._file.flush()
            file._file.seek(-(len(data) // 2), os.SEEK_CUR)
            counted(file, data)

        patch.setattr(os, "fsync", sync)
        patch.setattr(HashedFile, "write", write_half)
    said = error_of(lambda: write_sharded(folder, 2, run_id=RUN_ID, tensors=tensors, values=values_of(2)))
    if kill_at is None:
        (notes / "said").write_text("" if said is None else f"{said[0]}: {said[1]}", encoding="utf-8")


def die(notes: Path, point: str) -> None:
    descriptor = os.open(notes / "point", os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, point.encode())
    os.kill(os.getpid(), signal.SIGKILL)


def begin(store: Path, rank: int, size: int) -> None:
    dist.init_process_group(
        "gloo", init_method=store.as_uri(), rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT_S)
    )


def both(folder: Path, notes: Path, *, killed: int | None = None, number: int = -1) -> None:
    """Fork two ranks and wait for both."""
    notes.mkdir()
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                begin(notes / "store", rank, 2)
                write(folder, rank, notes, number if rank == killed else None)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    wait_for(children)


def wait_for(children: list[int]) -> None:
    until = time.monotonic() + LIMIT_S
    while children:
        for child in list(children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                children.remove(child)
                assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "a rank failed by itself"
        if time.monotonic() > until:
            for child in children:
                os.kill(child, signal.SIGKILL)
            raise AssertionError("a rank hangs")
        time.sleep(0.002)


def kill_everywhere(template: Path, killed: int) -> None:
    for number in itertools.count():
        root = template.with_name(str(number))
        root.mkdir()
        folder = shutil.copytree(template, root / "left")
        notes = root / "notes"
        both(folder, notes, killed=killed, number=number)
        if not (notes / "point").exists():
            return
        if number % 3 == 0:
            shutil.copytree(folder, root / "next")
            both(root / "next", root / "later")
            assert (root / "later" / "said").read_text(encoding="utf-8") == ""
        said = (notes / "said").read_text(encoding="utf-8")
        point = (notes / "point").read_text(encoding="utf-8")
        sys.stdout.write(json.dumps([point, said, str(root)]) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1]).parent
    begin(root / "store", 0, 1)  # loads what every child would otherwise load itself
    save(root / "warm", 1)
    dist.destroy_process_group()
    kill_everywhere(Path(sys.argv[1]), int(sys.argv[2]))
