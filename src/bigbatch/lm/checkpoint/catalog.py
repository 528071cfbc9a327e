"""The checkpoints in a folder: list them, find the newest valid one, remove old ones.

    step-N            a complete checkpoint
    step-N.partial    a checkpoint that was being written when its process ended
    step-N.deleted    a checkpoint that was being removed when its process ended

Files of any other name are ignored.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bigbatch.errors import CheckpointError, os_reason
from bigbatch.lm.checkpoint.integrity import IntegrityError, verified_manifest, verify
from bigbatch.lm.files import remove, sync_folder

_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
_LEFT_OVER = re.compile(r"step-(0|[1-9][0-9]*)\.(partial|deleted)")


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint of a folder.

    Attributes:
        path: Its folder.
        step: Number of updates done.
        num_bytes: Size of its files, valid or not.
        written_at: Time of writing, in UTC; None if the manifest cannot be read.
        reason: Why it is invalid, as `verify` returns it; None if it is valid.
    """

    path: Path
    step: int
    num_bytes: int
    written_at: datetime | None
    reason: str | None


def numbered(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first, valid or not; none if the folder does not exist.

    Raises:
        CheckpointError: The folder cannot be listed.
    """
    try:
        found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"the checkpoints in {folder} cannot be listed: {os_reason(error)}.") from error
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def _verified(paths: list[Path]) -> Iterator[tuple[Path, str | None]]:
    """Verify one checkpoint after the other; skip those that another process removes meanwhile."""
    for path in paths:
        reason = verify(path)
        if reason is None or os.path.lexists(path):
            yield path, reason


def newest(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Find the newest valid checkpoint, and the newer ones that are invalid.

    Returns:
        Its folder, or None; then the invalid ones with reasons, newest first.

    Raises:
        CheckpointError: The folder cannot be listed.
    """
    rejected: list[tuple[Path, str]] = []
    for path, reason in _verified(numbered(folder)[::-1]):
        if reason is None:
            return path, rejected
        rejected.append((path, reason))
    return None, rejected


def list_all(folder: Path) -> list[CheckpointInfo]:
    """Verify every checkpoint in a folder; return them with the newest last.

    Raises:
        CheckpointError: The folder cannot be listed.
    """
    return [kept for path in numbered(folder) if (kept := examine(path)) is not None]


def examine(path: Path) -> CheckpointInfo | None:
    """Verify one checkpoint and describe it; return None if it no longer exists."""
    reason = verify(path)
    if reason is not None and not os.path.lexists(path):
        return None
    written_at = None
    with suppress(IntegrityError):
        written_at = verified_manifest(path).written_at
    return CheckpointInfo(path, step_of(path), _size_of(path), written_at, reason)


def _size_of(path: Path) -> int:
    num_bytes = 0
    with suppress(OSError):
        for file in path.iterdir():
            num_bytes += file.stat().st_size
    return num_bytes


def prune(folder: Path, *, keep: int) -> list[Path]:
    """Remove the checkpoints that are older than the ``keep`` newest valid ones; those are read to verify them.

    Invalid ones do not count, and nothing is removed while the newest of all is invalid. Each is renamed to
    ``step-N.deleted`` first, so that a killed process never leaves a partly removed checkpoint under a valid name.

    Args:
        folder: The folder of the checkpoints.
        keep: Number of valid ones to keep, at least 1.

    Returns:
        The removed ones, oldest first.

    Raises:
        ValueError: ``keep`` is less than 1.
        CheckpointError: One cannot be removed; the newest stays valid.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} would leave no checkpoint: pass 1 or more.")
    remove_leftovers(folder)
    paths = numbered(folder)
    old = paths[: paths.index(_oldest_kept(paths, keep))] if paths else []
    for path in old:
        try:
            path.rename(path.with_name(f"{path.name}.deleted"))
        except OSError as error:
            raise CheckpointError(failure(folder, path, "removed from", error)) from error
    if old:
        _remove_renamed(folder, old)
    return old


def _oldest_kept(paths: list[Path], keep: int) -> Path:
    """Return the oldest checkpoint to keep: the ``keep``-th valid one from the newest, or the oldest of all."""
    num_whole = 0
    for path, reason in _verified(paths[::-1]):
        if reason is not None and path == paths[-1]:
            break
        num_whole += reason is None
        if num_whole == keep:
            return path
    return paths[0]


def _remove_renamed(folder: Path, old: list[Path]) -> None:
    """Empty the folders only after their new names are on disk: a power failure could restore the old names."""
    path = old[0]
    try:
        sync_folder(folder)
        for path in old:
            remove(path.with_name(f"{path.name}.deleted"))
    except OSError as error:
        raise CheckpointError(failure(folder, path, "removed from", error)) from error


def remove_leftovers(folder: Path) -> None:
    """Remove the leftovers of killed processes; those that cannot be removed stay and do no harm."""
    with suppress(OSError):
        for path in folder.iterdir():
            if _LEFT_OVER.fullmatch(path.name):
                with suppress(OSError):
                    remove(path)


def failure(folder: Path, path: Path, done: str, error: OSError) -> str:
    """Return the message about a checkpoint that could not be written or removed, with the last valid one."""
    good = None
    with suppress(CheckpointError):
        good = next((p for p in numbered(folder)[::-1] if p != path and verify(p) is None), None)
    stays = "no other valid one exists" if good is None else f"the last valid one is {good.name}"
    return f"checkpoint {path.name} could not be {done} {folder}: {os_reason(error)}; {stays}."
