"""Faults injected into a rank before the command, as `support.torchrun_ranks.Patch`."""

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bigbatch.accumulation.pending_update import PendingUpdate
from bigbatch.lm.checkpoint.manager import CheckpointManager
from bigbatch.lm.training.trainer import Trainer
from support.torchrun_ranks import Patch


def all_of(*patches: Patch) -> Patch:
    """Apply all patches."""
    return partial(_all_of, patches)


def _all_of(patches: tuple[Patch, ...], rank: int) -> None:
    for patch in patches:
        patch(rank)


def on(ranks: set[int], patch: Patch) -> Patch:
    """Apply a patch on these ranks only."""
    return partial(_on, ranks, patch)


def _on(ranks: set[int], patch: Patch, rank: int) -> None:
    if rank in ranks:
        patch(rank)


def signal_in_update(step: int, number: int = signal.SIGTERM) -> Patch:
    """Send a signal to the rank when an update begins."""
    return partial(_at_update, step, partial(_signal, number))


def signal_in_window(step: int, number: int = signal.SIGTERM, *, twice: bool = False) -> Patch:
    """Send a signal to the rank in an update, after its first micro-batch."""
    return partial(_at_update, step, partial(_at_microbatch, partial(_signal, number, twice=twice)))


def kill_in_window(step: int) -> Patch:
    """Kill the rank in an update, after its first micro-batch."""
    return signal_in_window(step, signal.SIGKILL)


def kill_at_checkpoint(number: int) -> Patch:
    """Kill the rank before it writes its number-th checkpoint."""
    return partial(_kill_at_checkpoint, number)


def _kill_at_checkpoint(number: int, _rank: int) -> None:
    write, counted = CheckpointManager._write, iter(range(1, 1000))

    def patched(self: CheckpointManager, *words: Any) -> None:
        if next(counted) == number:
            _signal(signal.SIGKILL)
        write(self, *words)

    CheckpointManager._write = patched  # type: ignore[method-assign]


def _signal(number: int, *, twice: bool = False) -> None:
    for _ in range(1 + twice):
        os.kill(os.getpid(), number)


def _at_update(step: int, act: Callable[[], None], _rank: int) -> None:
    update = Trainer._update

    def patched(self: Trainer, now: int, *words: Any) -> Any:
        if now == step:
            act()
        return update(self, now, *words)

    Trainer._update = patched  # type: ignore[method-assign]


def _at_microbatch(act: Callable[[], None]) -> None:
    """Call ``act`` once, after the next micro-batch."""
    add = PendingUpdate.add

    def patched(self: PendingUpdate, *words: Any, **options: Any) -> None:
        PendingUpdate.add = add  # type: ignore[method-assign]
        add(self, *words, **options)
        act()

    PendingUpdate.add = patched  # type: ignore[method-assign]


def out_of_memory(step: int) -> Patch:
    """Raise an out-of-memory error once in the forward of an update."""
    return partial(_at_update, step, _out_of_memory)


def _out_of_memory() -> None:
    forward = torch.nn.Embedding.forward

    def patched(self: Any, *words: Any) -> Any:
        torch.nn.Embedding.forward = forward  # type: ignore[method-assign]
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    torch.nn.Embedding.forward = patched  # type: ignore[method-assign]


def note_windows(folder: Path) -> Patch:
    """Log the samples and the token budget of each rank in each update, one line per update."""
    return partial(_note_windows, folder)


def _note_windows(folder: Path, rank: int) -> None:
    update = Trainer._update

    def noted(self: Trainer, step: int, window: list[int], *words: Any) -> Any:
        with (folder / f"{rank}.jsonl").open("a") as file:
            file.write(json.dumps([step, window, self.shard_window(window), self.engine.token_budget]) + "\n")
        return update(self, step, window, *words)

    Trainer._update = noted  # type: ignore[method-assign]


def fail_in_window(step: int) -> Patch:
    """Raise an ArithmeticError in an update, after the first micro-batch."""
    return partial(_at_update, step, partial(_at_microbatch, _fail))


def _fail() -> None:
    raise ArithmeticError("something of its own")


def hold_in_window(step: int, reached: Path, pipe: Path) -> Patch:
    """Block the rank once in an update, after its first micro-batch, until a pipe is written to."""
    return partial(_at_update, step, partial(_at_microbatch, partial(_hold, reached, pipe)))


def _hold(reached: Path, pipe: Path) -> None:
    if not reached.exists():
        reached.touch()
        pipe.read_bytes()


def wait_for_signal_in_window(step: int, reached: Path, *, number: int = 1) -> Patch:
    """Block the rank in an update, after its first micro-batch, until it has received so many signals."""
    return partial(_at_update, step, partial(_at_microbatch, partial(_wait_for_signal, reached, number)))


def _wait_for_signal(reached: Path, number: int) -> None:
    received, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    reached.touch()
    for _ in range(number):
        os.read(received, 1)
    signal.set_wakeup_fd(-1)
