"""New files that are hashed while they are written, and synced to the disk."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bigbatch.lm.checkpoint.manifest import Stamp


class HashedFile:
    """A file being written; its bytes are counted and hashed as they are written, not read back."""

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
        """Size and SHA-256 of the bytes written so far."""
        return Stamp(self._num_bytes, self._digest.hexdigest())


@contextmanager
def new_file(path: Path) -> Iterator[HashedFile]:
    """Create a file; at the end of the block it is on disk.

    Raises:
        OSError: It exists, or cannot be created, written or synced; a partly written file stays.
    """
    with path.open("xb") as file:
        yield HashedFile(file)
        file.flush()
        os.fsync(file.fileno())
