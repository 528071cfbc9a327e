"""One process at a time in a run directory: a lock that the kernel drops when its holder dies, however it dies."""

import errno
import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bigbatch.errors import InputError
from bigbatch.lm.runs.file_names import LOCK

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LONGEST = 4096  # bytes of the file that are read for a message

_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # by the file system, as some of clusters are mounted


class RunLock:
    """Hold a run directory for oneself.

        with RunLock(folder):
            ...                     # a second one, of any thread or process that sees this file system, is refused

    The lock is on the open file ``.lock``, not in its content, so a killed holder leaves nothing stale; the content
    only tells the second one whom to ask, and the empty file stays. Children that are forked do not hold the lock.

    Args:
        folder: The run directory, which is there.

    Attributes:
        is_exclusive: Whether the lock is held. False within the context where the system has no such locks (Windows,
            some network file systems): nothing keeps a second one out there.

    Raises:
        InputError: On entering: somebody else holds it, or the folder is not there or cannot be written.
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
            _write(self._descriptor, _owner())
        except OSError as error:
            self._close()
            raise InputError(f"{self.folder} cannot be locked: {_why(error)}.") from error
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
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        try:
            return os.open(self.folder / LOCK, flags, 0o644)
        except FileNotFoundError:
            raise InputError(f"there is no folder {self.folder}.") from None
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written: {_why(error)}.") from error

    def _lock(self, descriptor: int) -> bool:
        if fcntl is None:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.folder} is in use by {_holder(descriptor)}: wait for it, or stop it.") from None
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
        return True

    def _close(self) -> None:
        descriptor, self._descriptor, self.is_exclusive = self._descriptor, None, False
        if descriptor is not None:
            os.close(descriptor)


def _owner() -> dict[str, Any]:
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def _write(descriptor: int, owner: dict[str, Any]) -> None:
    text = json.dumps(owner).encode("ascii") + b"\n"
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, text)
    os.ftruncate(descriptor, len(text))


def _holder(descriptor: int) -> str:
    """Say who holds the lock, as far as the file tells; it may be half written, or by anyone."""
    try:
        owner = json.loads(os.read(descriptor, LONGEST))
        pid, host, since = int(owner["pid"]), str(owner["host"]), str(owner["since"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return "another process"
    if not (host + since).isprintable():
        return "another process"
    return f"process {pid} on {host} since {since}"


def _why(error: OSError) -> str:
    reason = error.strerror or str(error)
    return reason[:1].lower() + reason[1:]
