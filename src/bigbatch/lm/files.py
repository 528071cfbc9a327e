"""Files that survive a crash: sync folders, remove trees, name the reason of an OSError."""

import errno
import os
import shutil
from pathlib import Path

UNSYNCABLE = (errno.EINVAL, errno.ENOTSUP)  # what network and FUSE file systems say that cannot sync a folder


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


def os_reason(error: OSError) -> str:
    """Give the reason of the operating system as the end of a sentence: ``no space left on device``."""
    reason = error.strerror or str(error) or type(error).__name__
    return reason[0].lower() + reason[1:]
