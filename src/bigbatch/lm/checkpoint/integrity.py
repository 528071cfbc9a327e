"""Integrity of a checkpoint: no file missing, none added, every byte as it was written.

folder → manifest → names → for each file: size → SHA-256
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from os import fstat
from pathlib import Path

from bigbatch.errors import os_reason
from bigbatch.lm.checkpoint import manifest as manifests
from bigbatch.lm.checkpoint.manifest import Manifest, NewerFormatError, Stamp
from bigbatch.lm.files import is_folder, open_regular

LARGEST_MANIFEST = 2**24  # bytes; about 150 per file, and every rank may write several files


class IntegrityError(Exception):
    """A checkpoint that is incomplete or damaged; the message is a clause that names the file."""


class NewerCheckpointError(IntegrityError):
    """A checkpoint that a newer bigbatch wrote, which must be neither skipped nor replaced."""


def verify(path: Path) -> str | None:
    """Return why a checkpoint is invalid, or None if it is valid.

    Reads every byte, in constant memory, and loads nothing.

    Args:
        path: The folder ``…/step-N``; it must have the step of its manifest.

    Returns:
        A clause that names the file, such as ``model.safetensors has 1,024 bytes, and the manifest says 2,048``.
    """
    try:
        verified(path)
    except IntegrityError as reason:
        return str(reason)
    return None


def verified(path: Path) -> Manifest:
    """Verify a checkpoint like `verify`, and return its manifest.

    Raises:
        IntegrityError: The checkpoint is invalid.
    """
    manifest = verified_manifest(path)
    for name, stamp in manifest.files.items():
        with opened(path, name) as file:
            check_size(name, stamp, fstat(file.fileno()).st_size)
            check_digest(name, stamp, hashlib.file_digest(file, "sha256").hexdigest())
    return manifest


def verified_manifest(path: Path) -> Manifest:
    """Read the manifest of a checkpoint and check the names in its folder against it; the files are not read.

    Raises:
        IntegrityError: The manifest is damaged or of another step, or the folder contains more or fewer files.
    """
    names = _names(path)
    with opened(path, manifests.FILE) as file:
        num_bytes = fstat(file.fileno()).st_size  # read() allocates the size that it is called with
        data = file.read(min(num_bytes, LARGEST_MANIFEST))
    try:
        manifest = manifests.parse(data)
    except NewerFormatError as reason:
        raise NewerCheckpointError(str(reason)) from None
    except ValueError as reason:
        raise IntegrityError(str(reason)) from None
    if path.absolute().name != f"step-{manifest.step}":
        raise IntegrityError(
            f"{manifests.FILE} is of step {manifest.step}, and the folder is called {path.absolute().name}"
        )
    for name in manifest.files:
        if name not in names:
            raise IntegrityError(f"{name} is missing")
    for name in sorted(names - {*manifest.files, manifests.FILE}):
        raise IntegrityError(f"{name} does not belong to it")
    return manifest


def is_of_run(path: Path, run_id: str) -> bool:
    """Return whether a path is a folder with the manifest of a run and no other files than the manifest names.

    Its files may be missing or damaged.
    """
    try:
        names = _names(path)
        with opened(path, manifests.FILE) as file:
            manifest = manifests.parse(file.read(min(fstat(file.fileno()).st_size, LARGEST_MANIFEST)))
    except (IntegrityError, ValueError):
        return False
    known = {*manifest.files, manifests.FILE}
    is_named_so = path.absolute().name == f"step-{manifest.step}"
    return is_named_so and manifest.run_id == run_id and names <= known and not any(map(is_folder, path.iterdir()))


def _names(path: Path) -> set[str]:
    if path.is_symlink():
        raise IntegrityError(f"{path} is a link, which is not followed")
    try:
        return {entry.name for entry in path.iterdir()}
    except FileNotFoundError:
        raise IntegrityError(f"there is no folder {path}") from None
    except NotADirectoryError:
        raise IntegrityError(f"{path} is not a folder") from None
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {os_reason(error)}") from error


@contextmanager
def opened(path: Path, name: str) -> Iterator[BufferedReader]:
    """Open a file of a checkpoint for reading.

    Raises:
        IntegrityError: It is missing, not a file, or cannot be read, also within the block.
    """
    try:
        with open_regular(path / name) as file:
            yield file
    except FileNotFoundError:
        raise IntegrityError(f"{name} is missing") from None
    except IsADirectoryError:
        raise IntegrityError(f"{name} is not a file") from None
    except OSError as error:
        raise IntegrityError(f"{name} cannot be read: {os_reason(error)}") from error


def check_size(name: str, stamp: Stamp, num_bytes: int) -> None:
    """Check the size of a file against the manifest.

    Raises:
        IntegrityError: It differs.
    """
    if num_bytes != stamp.num_bytes:
        raise IntegrityError(f"{name} has {num_bytes:,} bytes, and the manifest says {stamp.num_bytes:,}")


def check_digest(name: str, stamp: Stamp, sha256: str) -> None:
    """Check the SHA-256 of a file against the manifest.

    Raises:
        IntegrityError: It differs.
    """
    if sha256 != stamp.sha256:
        raise IntegrityError(f"{name} differs from what was written (SHA-256)")
