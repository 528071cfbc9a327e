"""Files that count once they are on disk: hashed while they are written, synced, removed without a trace."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bigbatch.lm.checkpoint.manifest import Stamp

UNSYNCABLE = (errno.EINVAL, errno.ENOTSUP)  # what network and FUSE file systems say that cannot sync a folder


class HashedFile:
    """A file being written; what goes into it is counted and hashed on its way, not read back afterwards."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._num_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._file.write(data)
        self._digest.update(data)
        self._num_bytes += len(data)

    @property
    def stamp(self) -> Stamp:
        """Size and SHA-256 of what was written so far."""
        return Stamp(self._num_bytes, self._digest.hexdigest())


@contextmanager
def new_file(path: Path) -> Iterator[HashedFile]:
    """Open a file that is not there yet; at the end of the block it is on disk.

    Raises:
        OSError: It cannot be made, written or synced; what there is of it stays.
    """
    with path.open("xb") as file:
        yield HashedFile(file)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to disk, where the system can.

    Raises:
        OSError: It could, and failed.
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
    """Remove a file, a link or a folder with all that is in it; nothing is fine too.

    Raises:
        OSError: It cannot be removed, or not all of it.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def why(error: OSError) -> str:
    """Give the reason of the operating system as the end of a sentence: ``no space left on device``."""
    reason = error.strerror or str(error) or type(error).__name__
    return reason[0].lower() + reason[1:]
