"""Durable file operations: atomic writes and renames, folder sync, removal; and the kind of a file."""

import errno
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

PARTIAL = ".partial"  # suffix of a file or folder that is still being written
UNSYNCABLE = (errno.EINVAL, errno.ENOTSUP)  # raised by network and FUSE file systems that cannot sync a folder


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers, also after a crash, see the previous content or the new one.

    Writes ``NAME.PID.partial`` next to ``path``, syncs it, renames it to ``path`` and syncs the folder. On an error the
    partial file is removed and the previous content stays.

    Raises:
        OSError: The file cannot be written, synced or renamed.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def replace_folder(partial: Path, target: Path, *, old: Path) -> None:
    """Rename a complete folder to ``target``; an existing ``target`` is renamed to ``old`` first and removed last.

    What cannot be removed of ``old`` stays and has to be removed before the next call.

    Raises:
        OSError: A rename or the sync of the parent folder failed.
    """
    try:
        target.rename(old)
        replaces = True
    except FileNotFoundError:
        replaces = False
    partial.rename(target)
    sync_folder(target.parent)
    if replaces:
        with suppress(OSError):
            remove(old)


def sync_folder(path: Path) -> None:
    """Sync the entries of a folder to disk, where the system supports it.

    Raises:
        OSError: The system supports it and the sync failed.
    """
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSYNCABLE:
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content, if it exists.

    Raises:
        OSError: It cannot be removed completely.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def file_kind(path: Path) -> str:
    """Return what a path is, after links: a regular file, a folder, a pipe, a socket or a device.

    Raises:
        OSError: It does not exist or cannot be read.
    """
    mode = path.stat().st_mode
    kinds = ((stat.S_ISREG, "a regular file"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"))
    found = next((kind for is_kind, kind in kinds if is_kind(mode)), None)
    return found or ("a socket" if stat.S_ISSOCK(mode) else "a device")
