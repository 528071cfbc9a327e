"""Persistent gloo ranks that run one function after another, so that torch is loaded once.

pool = Pool(2)
results = pool.run(function, argument)      # function(argument) on every rank → one result per rank
"""

import gc
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.gloo_processes import forking_context

TIMEOUT_S = 30.0


class RankError(AssertionError):
    """Error of a function on a rank, with its traceback."""


class Pool:
    """Ranks of one process group.

    Args:
        size: Number of ranks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._context = forking_context()
        self._ranks: list[tuple[Any, Any]] = []

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Run a module-level function on every rank and return the results in rank order.

        If a rank raises, hangs or dies, all processes are ended and the next call starts new ones.

        Raises:
            RankError: A rank raised, timed out or died.
        """
        if not self._ranks:
            self._start()
        for _, pipe in self._ranks:
            pipe.send((function, arguments))
        outcomes = [self._receive(rank, timeout_s) for rank in range(self.size)]
        problems = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(outcomes) if not ok]
        if problems:
            self.close()
            raise RankError("\n".join(problems))
        return [result for _, result in outcomes]

    def close(self) -> None:
        """End the processes."""
        for process, _ in self._ranks:
            process.kill()
            process.join()
        self._ranks = []

    def _start(self) -> None:
        store = Path(tempfile.mkdtemp(prefix="ranks-")) / "store"
        for rank in range(self.size):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs, rank, self.size, str(store)), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def _receive(self, rank: int, timeout_s: float) -> tuple[bool, Any]:
        _, pipe = self._ranks[rank]
        if not pipe.poll(timeout_s):
            return False, f"no result within {timeout_s} s"
        try:
            return pipe.recv()
        except EOFError:
            return False, "died"


Pools = Callable[[int], Pool]


def _serve(pipe: Any, rank: int, size: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    gc.freeze()  # running out of memory collects garbage: faster without the objects of imports
    warnings.simplefilter("error", FutureWarning)  # raised by bigbatch; FSDP itself warns about the models
    warnings.simplefilter("error", DeprecationWarning)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            outcome = True, function(*arguments)
        except BaseException:  # noqa: BLE001 - reported to the test
            outcome = False, traceback.format_exc()
        pipe.send(outcome)
