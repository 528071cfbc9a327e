"""Exclusive lock of a run directory, released by the operating system when its holder ends for any reason."""

import errno
import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from bigbatch.errors import InputError, os_reason
from bigbatch.lm.files import check_regular
from bigbatch.lm.runs.file_names import LOCK

MAX_OWNER_BYTES = 4096  # of the file that are read for a message

_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # the file system has no locks, as on some clusters


class RunLock:
    """Exclusive, non-blocking lock of a run directory.

        with RunLock(folder):
            ...                     # any other RunLock(folder), in any thread or process, raises InputError

    The lock is that of `filelock` on the open file ``.lock`` (``flock`` on Unix, ``LockFileEx`` on Windows), so the
    system releases it when the holder is killed. `filelock.lock_descriptor` is used and not `filelock.FileLock`: this
    class opens the file itself, which follows no link, and writes the owner into it. The content only serves the error
    message of a second process; the empty file stays. Forked children close their copy of the file and do not hold the
    lock.

    Args:
        folder: The run directory, which exists.

    Attributes:
        is_exclusive: Whether the lock is held. False within the context if the file system has no locks (some network
            file systems): another process is not kept out then.

    Raises:
        InputError: On entering: another process holds it, or the folder does not exist or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_exclusive = False
        self._descriptor: int | None = None

    def __enter__(self) -> "RunLock":
        assert self._descriptor is None, "a lock is entered once at a time"
        self._descriptor = self._open()
        try:
            self.is_exclusive = self._lock(self._descriptor)
            _write_owner(self._descriptor, _owner())
        except OSError as error:
            self._close()
            raise InputError(f"{self.folder} cannot be locked: {os_reason(error)}.") from error
        except BaseException:
            self._close()
            raise
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._close)  # the lock lasts until the last copy of the file is closed
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            self._close()

    def _open(self) -> int:
        path = self.folder / LOCK
        flags = os.O_RDWR | os.O_CREAT
        flags |= sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"))
        try:
            with suppress(FileNotFoundError):
                _check_plain(path, os.lstat(path))
            descriptor = os.open(path, flags, 0o644)
            try:
                _check_plain(path, os.fstat(descriptor))
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor
        except FileNotFoundError:
            raise InputError(f"there is no folder {self.folder}.") from None
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written: {os_reason(error)}.") from error

    def _lock(self, descriptor: int) -> bool:
        try:
            locked = lock_descriptor(descriptor, blocking=False)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
        if not locked:
            raise InputError(f"{self.folder} is in use by {_read_owner(descriptor)}: wait for it, or stop it.")
        return True

    def _close(self) -> None:
        descriptor, self._descriptor, self.is_exclusive = self._descriptor, None, False
        if descriptor is not None:
            os.close(descriptor)


def _check_plain(path: Path, status: os.stat_result) -> None:
    """Raise an OSError unless a status is that of a regular file with one name: the owner is written into it."""
    try:
        check_regular(path, status)
    except OSError as error:
        raise OSError(error.errno, f"{path.name}: {error.strerror}", str(path)) from error
    if status.st_nlink > 1:
        raise OSError(errno.EMLINK, f"{path.name} has another hard link", str(path))


def _owner() -> dict[str, Any]:
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def _write_owner(descriptor: int, owner: dict[str, Any]) -> None:
    text = json.dumps(owner).encode("ascii") + b"\n"
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, text)
    os.ftruncate(descriptor, len(text))


def _read_owner(descriptor: int) -> str:
    """Describe the holder from the content of the file, which may be incomplete or written by another program."""
    try:
        owner = json.loads(os.read(descriptor, MAX_OWNER_BYTES))
        pid, host, since = int(owner["pid"]), str(owner["host"]), str(owner["since"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return "another process"
    if not (host + since).isprintable():
        return "another process"
    return f"process {pid} on {host} since {since}"
