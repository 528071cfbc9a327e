"""The smaller micro-batch of a sharded run that ran out of memory on one rank, stored in its run directory.

A sharded run cannot continue in place after an out-of-memory error: it saves a smaller size and restarts.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Literal, NoReturn

from bigbatch.batching.plan import TokenBudget
from bigbatch.errors import BigbatchError, RestartError, ShardedMemoryError, os_reason
from bigbatch.lm.files import read_json, write_atomically
from bigbatch.lm.runs.file_names import SMALLER_MICROBATCH
from bigbatch.lm.training.setup import TrainingSetup

SHRINK = 0.8  # a restart costs minutes, so the size shrinks faster than in `Engine.step`, which retries in place


def restart_smaller(
    error: ShardedMemoryError,
    microbatch: int | TokenBudget | Literal["auto"],
    setup: TrainingSetup,
    *,
    rank: int,
) -> NoReturn:
    """Save a smaller micro-batch for the restarted processes, and raise.

    Args:
        error: The error of this rank.
        microbatch: The size that ran out of memory; never ``"auto"`` in a sharded run.
        setup: Of the run, whose directory receives the smaller size.
        rank: This rank.

    Raises:
        RestartError: The smaller size is saved.
        ShardedMemoryError: No smaller size exists.
    """
    assert microbatch != "auto", "sharded runs have a fixed micro-batch"
    folder = setup.config.out
    assert folder is not None, "set before training"
    smaller, unit = next_smaller(microbatch, longest=setup.training.longest), unit_of(microbatch)
    if smaller is None:
        raise error
    save_override(folder, smaller, unit)
    raise RestartError(
        f"{str(error).partition(',')[0]} on rank {rank}. Restart the run with torchrun --max-restarts or bigbatch "
        f"resume {folder}: it resumes from its last checkpoint with micro-batches of {smaller:,} {unit}."
    ) from error


def next_smaller(microbatch: int | TokenBudget, *, longest: int) -> int | None:
    """Return the next smaller number of samples or tokens; None if there is none.

    Args:
        microbatch: The size that did not fit.
        longest: Tokens of the longest sequence, the minimum of a token budget.
    """
    now = microbatch.tokens if isinstance(microbatch, TokenBudget) else microbatch
    least = longest if isinstance(microbatch, TokenBudget) else 1
    smaller = max(least, int(now * SHRINK))
    return smaller if smaller < now else None


def save_override(folder: Path, size: int, unit: str) -> None:
    """Write a micro-batch into a run directory, atomically; ``unit`` is tokens or sequences.

    Raises:
        BigbatchError: It cannot be written.
    """
    path = folder / SMALLER_MICROBATCH
    try:
        write_atomically(path, json.dumps({"size": size, "unit": unit}).encode() + b"\n")
    except OSError as error:
        raise BigbatchError(f"{path} cannot be written: {os_reason(error)}.") from error


def apply_override(folder: Path | None, microbatch: int | TokenBudget, *, longest: int) -> int | TokenBudget:
    """Return a micro-batch, or the smaller one that a run directory holds in the same unit.

    Args:
        folder: The run directory; None if it does not exist yet.
        microbatch: The configured size.
        longest: As for `next_smaller`.
    """
    if folder is None:
        return microbatch
    with suppress(OSError, ValueError, TypeError, KeyError):
        found = read_json(folder / SMALLER_MICROBATCH)
        size = found["size"]
        if found["unit"] == unit_of(microbatch) and type(size) is int and size > 0:
            if isinstance(microbatch, TokenBudget):
                return TokenBudget(max(longest, min(size, microbatch.tokens)))
            return min(size, microbatch)
    return microbatch


def unit_of(microbatch: int | TokenBudget) -> str:
    """Return the unit of a micro-batch."""
    return "tokens" if isinstance(microbatch, TokenBudget) else "sequences"
