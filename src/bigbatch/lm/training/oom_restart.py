"""The micro-batch that a sharded run goes on with after memory ran out on one of its ranks, kept in its folder."""

import json
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from bigbatch.batching.plan import TokenBudget
from bigbatch.errors import RestartError, ShardedMemoryError
from bigbatch.lm.files import write_atomically
from bigbatch.lm.runs.file_names import SMALLER_MICROBATCH

SHRINK = 0.8  # a restart costs minutes: fewer and larger steps than an engine takes that goes on in place


def restart_smaller(
    error: ShardedMemoryError, microbatch: int | TokenBudget, folder: Path, *, longest: int, rank: int
) -> NoReturn:
    """Keep a smaller micro-batch for the processes that go on after this one has ended.

    Args:
        error: That of this rank.
        microbatch: In which memory ran out.
        folder: The run directory.
        longest: As for `next_smaller`.
        rank: This one.

    Raises:
        RestartError: It is kept.
        ShardedMemoryError: There is no smaller one.
    """
    smaller, unit = next_smaller(microbatch, longest=longest), unit_of(microbatch)
    if smaller is None:
        raise error
    save_override(folder, smaller, unit)
    raise RestartError(
        f"{str(error).partition(',')[0]} on rank {rank}: started again, the run goes on from its last checkpoint with "
        f"{smaller:,} {unit} a micro-batch, by torchrun with --max-restarts, or bigbatch resume {folder}."
    ) from error


def next_smaller(microbatch: int | TokenBudget, *, longest: int) -> int | None:
    """Give the next smaller number of samples or tokens; None where there is none.

    Args:
        microbatch: That did not fit.
        longest: Tokens of the longest sequence, which no budget may be below.
    """
    now = microbatch.tokens if isinstance(microbatch, TokenBudget) else microbatch
    least = longest if isinstance(microbatch, TokenBudget) else 1
    smaller = max(least, int(now * SHRINK))
    return smaller if smaller < now else None


def save_override(folder: Path, size: int, unit: str) -> None:
    """Write a micro-batch into a run directory, atomically; ``unit`` is tokens or sequences."""
    write_atomically(folder / SMALLER_MICROBATCH, json.dumps({"size": size, "unit": unit}).encode() + b"\n")


def apply_override(folder: Path | None, microbatch: int | TokenBudget, *, longest: int) -> int | TokenBudget:
    """Give a micro-batch, or the smaller one that a run directory holds where that counts in the same.

    Args:
        folder: The run directory; None where there is none yet.
        microbatch: That is asked for.
        longest: As for `next_smaller`.
    """
    if folder is None:
        return microbatch
    with suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads((folder / SMALLER_MICROBATCH).read_text(encoding="utf-8"))
        size = int(found["size"])
        if found["unit"] == unit_of(microbatch) and size > 0:
            if isinstance(microbatch, TokenBudget):
                return TokenBudget(max(longest, min(size, microbatch.tokens)))
            return min(size, microbatch)
    return microbatch


def unit_of(microbatch: int | TokenBudget) -> str:
    """Give what a micro-batch is counted in."""
    return "tokens" if isinstance(microbatch, TokenBudget) else "sequences"
