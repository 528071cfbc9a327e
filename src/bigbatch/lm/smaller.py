"""The micro-batch that a sharded run goes on with after memory ran out on one of its ranks, kept in its folder."""

import json
import os
from contextlib import suppress
from pathlib import Path

from bigbatch.plan import TokenBudget

FILE = "smaller.json"
SHRINK = 0.8  # a restart costs minutes: fewer and larger steps than an engine takes that goes on in place


def smaller_than(microbatch: int | TokenBudget, *, longest: int) -> int | None:
    """Give the next smaller number of samples or tokens; None where there is none.

    Args:
        microbatch: That did not fit.
        longest: Tokens of the longest sequence, which no budget may be below.
    """
    now = microbatch.tokens if isinstance(microbatch, TokenBudget) else microbatch
    least = longest if isinstance(microbatch, TokenBudget) else 1
    smaller = max(least, int(now * SHRINK))
    return smaller if smaller < now else None


def keep(folder: Path, size: int) -> None:
    """Write it into a run directory, so that it is whole or not there."""
    aside = folder / f"{FILE}.{os.getpid()}"
    with aside.open("wb") as file:
        file.write(json.dumps({"size": size}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(folder / FILE)


def kept(folder: Path | None, microbatch: int | TokenBudget) -> int | TokenBudget:
    """Give a micro-batch, or the smaller one that a run directory holds."""
    if folder is None:
        return microbatch
    with suppress(OSError, ValueError, TypeError, KeyError):
        size = int(json.loads((folder / FILE).read_text(encoding="utf-8"))["size"])
        if isinstance(microbatch, TokenBudget):
            return TokenBudget(min(size, microbatch.tokens))
        return min(size, microbatch)
    return microbatch
