"""The checkpoints in a folder: list them, find the newest valid one, remove old ones.

    step-N            a complete checkpoint
    step-N.partial    a checkpoint that was being written when its process ended
    step-N.deleted    a checkpoint that was being removed when its process ended
    step-N.kept       something else that was called step-N when that checkpoint was written

Files of any other name are ignored. The folder is not a link, and links in it are not followed. Only folders that are
provably of this run are removed: they hold its manifest, with its run id, and no other files.
"""

import itertools
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bigbatch.errors import CheckpointError, os_reason
from bigbatch.lm.checkpoint.integrity import (
    IntegrityError,
    NewerCheckpointError,
    is_of_run,
    verified,
    verified_manifest,
    verify,
)
from bigbatch.lm.checkpoint.manifest import is_part_name
from bigbatch.lm.files import is_folder, remove, sync_folder

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


def numbered(folder: Path, *, below: int | None = None) -> list[Path]:
    """Return the checkpoints in a folder, oldest first, valid or not; none if the folder does not exist.

    Args:
        folder: The folder of the checkpoints.
        below: Only those of earlier steps; None for all.

    Raises:
        CheckpointError: The folder is a link or cannot be listed.
    """
    check_not_link(folder)
    try:
        found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"the checkpoints in {folder} cannot be listed: {os_reason(error)}.") from error
    return sorted((path for path in found if below is None or step_of(path) < below), key=step_of)


def check_not_link(folder: Path) -> None:
    """Check that the folder of the checkpoints is not a link.

    Raises:
        CheckpointError: It is: another run, or other data, could be behind it.
    """
    if folder.is_symlink():
        raise CheckpointError(
            f"{folder} is a link, and links in a run directory are not followed. Move the folder that it points to "
            "here; to keep a run on another disk, link the whole run directory."
        )


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def newest(folder: Path, *, below: int | None = None) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Find the newest valid checkpoint, and the newer ones that are invalid.

    Args:
        folder: The folder of the checkpoints.
        below: Only those of earlier steps; None for all.

    Returns:
        Its folder, or None; then the invalid ones with reasons, newest first.

    Raises:
        CheckpointError: The folder is a link or cannot be listed.
        NewerCheckpointError: A newer bigbatch wrote the newest valid one.
    """
    rejected: list[tuple[Path, str]] = []
    for path in numbered(folder, below=below)[::-1]:
        try:
            verified(path)
        except NewerCheckpointError as reason:
            raise NewerCheckpointError(f"{path.name}: {reason}") from None
        except IntegrityError as reason:
            if os.path.lexists(path):  # else another process has just removed it
                rejected.append((path, str(reason)))
        else:
            return path, rejected
    return None, rejected


def list_all(folder: Path) -> list[CheckpointInfo]:
    """Verify every checkpoint in a folder; return them with the newest last.

    Raises:
        CheckpointError: The folder cannot be listed.
    """
    return [kept for path in numbered(folder) if (kept := examine(path)) is not None]


def examine(path: Path, *, run_id: str | None = None) -> CheckpointInfo | None:
    """Verify one checkpoint and describe it; return None if it no longer exists.

    Args:
        path: Its folder.
        run_id: Identifier of the run that it must belong to; None to accept any.
    """
    reason = verify(path)
    if reason is not None and not os.path.lexists(path):
        return None
    written_at = None
    with suppress(IntegrityError):
        manifest = verified_manifest(path)
        written_at = manifest.written_at
        if reason is None and run_id not in (None, manifest.run_id):
            reason = f"it belongs to run {manifest.run_id}, not to run {run_id}"
    return CheckpointInfo(path, step_of(path), _size_of(path), written_at, reason)


def _size_of(path: Path) -> int:
    num_bytes = 0
    with suppress(OSError):
        for file in path.iterdir():
            num_bytes += file.lstat().st_size
    return num_bytes


def prune(
    folder: Path,
    *,
    keep: int,
    run_id: str,
    best: int | None = None,
    on_note: Callable[[str], object] = lambda sentence: None,
) -> list[Path]:
    """Remove a run's checkpoints that are older than the ``keep`` newest valid ones; these are read to verify them.

    Invalid ones do not count, and those that are not provably of this run are left as they are. Each is renamed to
    ``step-N.deleted`` first, so that a killed process never leaves a partly removed checkpoint under a valid name.

    Args:
        folder: The folder of the checkpoints.
        keep: Number of valid ones to keep, at least 1.
        run_id: Identifier of the run.
        best: Step of a checkpoint that is kept however old it is; None for none.
        on_note: Receives a sentence about each one that is invalid or of another run.

    Returns:
        The removed ones, oldest first.

    Raises:
        ValueError: ``keep`` is less than 1.
        CheckpointError: The folder is a link, or a checkpoint cannot be removed; the newest stays valid.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} would leave no checkpoint: pass 1 or more.")
    remove_leftovers(folder)
    old = []
    for path in _older_than_kept(numbered(folder), keep, run_id, on_note):
        if step_of(path) == best:
            continue
        if is_of_run(path, run_id):
            old.append(path)
        elif os.path.lexists(path):
            on_note(f"{path} was not written by this run and is not removed")
    for path in old:
        try:
            path.rename(path.with_name(f"{path.name}.deleted"))
        except OSError as error:
            raise CheckpointError(failure(folder, path, "removed from", error)) from error
    if old:
        _remove_renamed(folder, old)
    return old


def _older_than_kept(paths: list[Path], keep: int, run_id: str, on_note: Callable[[str], object]) -> list[Path]:
    """Return those older than the ``keep``-th valid one of the run from the newest; none if there are fewer."""
    num_whole = 0
    for index in range(len(paths) - 1, -1, -1):
        path = paths[index]
        try:
            num_whole += verified(path).run_id == run_id
        except IntegrityError as reason:
            if os.path.lexists(path):
                on_note(f"checkpoint {path} is not valid and does not count as one to keep: {reason}")
        if num_whole == keep:
            return paths[:index]
    return []


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
    """Remove the leftovers of killed processes; those that cannot be removed stay and do no harm.

    They are folders of files with the names of a checkpoint; what else has their name is not ours and stays.

    Raises:
        CheckpointError: The folder is a link.
    """
    check_not_link(folder)
    with suppress(OSError):
        for path in folder.iterdir():
            if _LEFT_OVER.fullmatch(path.name) and is_folder(path):
                with suppress(OSError):
                    if all(map(_is_part, path.iterdir())):
                        remove(path)


def _is_part(path: Path) -> bool:
    return is_part_name(path.name) and not is_folder(path)


def set_aside(path: Path, run_id: str) -> Path | None:
    """Rename what is in the place of a new checkpoint and is not provably of this run; return its new name.

    Raises:
        OSError: It cannot be renamed.
    """
    if not os.path.lexists(path) or is_of_run(path, run_id):
        return None
    endings = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    names = (path.with_name(f"{path.name}.kept{ending}") for ending in endings)
    kept = next(name for name in names if not os.path.lexists(name))
    path.rename(kept)
    return kept


def failure(folder: Path, path: Path, done: str, error: OSError) -> str:
    """Return the message about a checkpoint that could not be written or removed, with the last valid one."""
    good = None
    with suppress(CheckpointError):
        good = next((p for p in numbered(folder)[::-1] if p != path and verify(p) is None), None)
    stays = "no other valid one exists" if good is None else f"the last valid one is {good.name}"
    return f"checkpoint {path.name} could not be {done} {folder}: {os_reason(error)}; {stays}."
