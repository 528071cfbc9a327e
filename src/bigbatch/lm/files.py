"""Durable file operations: atomic writes and renames, folder sync, removal; reading and appending without links.

The files of a run directory are opened with `open_regular`: a link is never followed, and a pipe or a device never
opened, since it could block.
"""

import errno
import json
import os
import shutil
import stat
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Literal, overload

PARTIAL = ".partial"  # suffix of a file or folder that is still being written
UNSYNCABLE = (errno.EINVAL, errno.ENOTSUP)  # raised by network and FUSE file systems that cannot sync a folder
LARGEST_JSON = 2**26  # bytes of a JSON file that are read
LARGEST_LOG = 2**30  # bytes of a file of lines that are read

_FLAGS = {"rb": os.O_RDONLY, "ab": os.O_WRONLY | os.O_APPEND | os.O_CREAT, "a+b": os.O_RDWR | os.O_APPEND | os.O_CREAT}
_SAFE = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"))


@overload
def open_regular(path: Path) -> BufferedReader: ...
@overload
def open_regular(path: Path, mode: Literal["rb", "ab", "a+b"]) -> BinaryIO: ...
def open_regular(path: Path, mode: Literal["rb", "ab", "a+b"] = "rb") -> BinaryIO:
    """Open a regular file. A file that has another hard link is replaced by a copy before it is opened for writing.

    Raises:
        OSError: It is a link, a folder, a pipe or a device, or cannot be opened; it was not changed or read.
    """
    with suppress(FileNotFoundError):
        check_regular(path, os.lstat(path))
    descriptor = os.open(path, _FLAGS[mode] | _SAFE, 0o666)
    try:
        status = os.fstat(descriptor)
        check_regular(path, status)
    except BaseException:
        os.close(descriptor)
        raise
    if mode != "rb" and status.st_nlink > 1:
        os.close(descriptor)
        write_atomically(path, path.read_bytes())
        return open_regular(path, mode)
    return os.fdopen(descriptor, mode)


def check_regular(path: Path, status: os.stat_result) -> None:
    """Check that a status is that of a regular file.

    Raises:
        OSError: It is not; the reason says what it is.
    """
    if stat.S_ISREG(status.st_mode):
        return
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    is_link = stat.S_ISLNK(status.st_mode)
    reason = "it is a link, which is not followed" if is_link else "it is not a regular file"
    raise OSError(errno.EINVAL, reason, str(path))


def read_regular(path: Path, *, limit: int = LARGEST_JSON) -> bytes:
    """Read a regular file.

    Raises:
        OSError: As `open_regular` raises it, or the file has more than ``limit`` bytes.
    """
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > limit:
            raise OSError(errno.EFBIG, f"it has {num_bytes:,} bytes, and at most {limit:,} are read", str(path))
        return file.read(limit + 1)


def read_json(path: Path, *, limit: int = LARGEST_JSON) -> Any:
    """Read a JSON file.

    Raises:
        OSError: As `read_regular` raises it.
        ValueError: As `parse_json` raises it.
    """
    return parse_json(read_regular(path, limit=limit))


def parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8.

    Raises:
        ValueError: It is not JSON, is nested too deeply, or an object has a key twice.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers, also after a crash, see the previous content or the new one.

    Writes ``NAME.PID.partial`` next to ``path``, syncs it, renames it to ``path`` and syncs the folder. On an error the
    partial file is removed and the previous content stays.

    Raises:
        OSError: The file cannot be written, synced or renamed.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    partial.unlink(missing_ok=True)  # of a killed process with this number, or a link, which is not followed
    try:
        with partial.open("xb") as file:
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
    if is_folder(path):
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


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder itself, not a link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False
