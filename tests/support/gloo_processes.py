"""Gloo ranks in new processes, each with a time limit.

    run(function, 2, *args) → [function(*args) of rank 0, of rank 1]

The function is module-level; torch.distributed is initialized when it is called. Warnings are errors.
"""

import multiprocessing
import multiprocessing.context
import os
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
_STARTING = threading.Lock()
"""Held while the environment is changed."""


def forking_context() -> multiprocessing.context.ForkServerContext:
    """Return a multiprocessing context whose processes are forks of one that has only imported `support.preloaded`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.preloaded"])
    # In Python 3.11 the server finds modules by the environment alone.
    with _STARTING, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]))
        forkserver.ensure_running()
    return context


@dataclass(frozen=True)
class Outcome:
    """Outcome of one rank: the returned ``value`` or the ``error`` as text; both None if it was killed."""

    value: Any = None
    error: str | None = None
    returned: bool = False
    exitcode: int | None = None


def run(function: Callable[..., Any], size: int, *args: Any, timeout_s: float = 60) -> list[Any]:
    """Call a function on every rank and return the results; fail the test if a rank fails or is killed."""
    outcomes = attempt(function, size, *args, timeout_s=timeout_s)
    for rank, outcome in enumerate(outcomes):
        if not outcome.returned:
            reason = outcome.error or f"ended with exit code {outcome.exitcode} without a result"
            raise AssertionError(f"rank {rank} of {size}: {reason}")
    return [outcome.value for outcome in outcomes]


def attempt(function: Callable[..., Any], size: int, *args: Any, timeout_s: float = 60) -> list[Outcome]:
    """Call a function on every rank and return the outcomes; fail the test only if a rank hangs."""
    context = forking_context()
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            words = (theirs, Path(folder) / "store", rank, size, timeout_s, function, args)
            process = context.Process(target=_child, args=words, daemon=True)
            process.start()
            theirs.close()
            started.append((process, ours))
        try:
            received = _received([ours for _, ours in started], time.monotonic() + timeout_s)
            for process, _ in started:
                process.join(timeout_s)
        finally:
            for process, ours in started:
                if process.is_alive():
                    process.kill()
                    process.join()
                ours.close()
    outcomes = []
    for (process, _), given in zip(started, received, strict=True):
        value, error = given or (None, None)
        outcomes.append(Outcome(value, error, given is not None and error is None, process.exitcode))
    return outcomes


def _received(connections: list[Connection], until: float) -> list[tuple[Any, str | None] | None]:
    """Receive the result of every rank; None for a rank that exits without one."""
    given: dict[Connection, tuple[Any, str | None] | None] = {}
    while missing := [connection for connection in connections if connection not in given]:
        ready = wait(missing, until - time.monotonic())
        if not ready:
            silent = [connections.index(connection) for connection in missing]
            raise AssertionError(f"ranks {silent} sent no result within the time limit")
        for connection in ready:
            try:
                given[connection] = connection.recv()
            except EOFError:
                given[connection] = None
    return [given[connection] for connection in connections]


def _child(
    result: Connection, store: Path, rank: int, size: int, timeout_s: float, function: Callable[..., Any], args: Any
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("error")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=store.as_uri(), rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
        )
        try:
            value = function(*args)
        finally:
            dist.destroy_process_group()
        result.send((value, None))
    except BaseException:  # noqa: BLE001 - raised in the parent
        result.send((None, traceback.format_exc()))
    finally:
        result.close()
