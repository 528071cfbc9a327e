"""Whether all ranks see the run directory, before anything is written there: shards and restarts need it.

first rank: a file next to the directory → other ranks: is it there? → a sentence, or the same path on every rank
"""

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from bigbatch.cli.torchrun import fail_together
from bigbatch.errors import InputError

if TYPE_CHECKING:
    from bigbatch.lm.distributed.ranks import RankContext

PATIENCE_S = 10.0  # network file systems may show a new file late


def shared_path(asked: Path | None, default: str, ranks: "RankContext") -> Path:
    """Return the run directory of all ranks. Collective.

    Args:
        asked: ``--out`` of this rank.
        default: Used if the first rank has no ``--out``.
        ranks: The processes of the run.

    Raises:
        SystemExit: The ranks have different directories, or do not share the file system. On a single rank, none.
    """
    if ranks.size == 1:
        return Path(asked or default)
    own = None if asked is None else str(asked)
    first, working = ranks.broadcast((own, str(Path.cwd())))
    with fail_together(ranks, "train"):
        if own != first:
            raise InputError(
                f"--out is {own or 'not set'}, and {first or 'not set'} on rank 0: pass the same flags to every rank."
            )
    first = first or ranks.broadcast(default)
    path = Path(first) if str(Path.cwd()) == working else Path(working, first)
    parents = Path(working, first).parents
    folder = Path(ranks.broadcast(str(next(each for each in parents if each.is_dir() or each == parents[-1]))))
    with _marker(folder) if ranks.is_first else nullcontext("") as name:
        marker = ranks.broadcast(name)
        with fail_together(ranks, "train"):
            if marker and not _appears(folder / marker):
                raise InputError(
                    f"{socket.gethostname()} does not see the files of rank 0 in {folder}, where {first} would be: "
                    "--out must be on a file system that all machines share."
                )
    return path


@contextmanager
def _marker(folder: Path) -> Iterator[str]:
    """Create an empty file in a folder, and remove it at the end; its name is empty if the folder is not writable."""
    try:
        handle, path = tempfile.mkstemp(prefix=".bigbatch-", dir=folder)
    except OSError:  # reported where the run directory is made
        yield ""
        return
    os.close(handle)
    try:
        yield Path(path).name
    finally:
        Path(path).unlink(missing_ok=True)


def _appears(path: Path) -> bool:
    end_s = time.monotonic() + PATIENCE_S
    while not path.exists():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.2)
    return True
