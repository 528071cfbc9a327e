"""Where a page is put: whole or not at all, and never over a file that is no page."""

import os
from contextlib import suppress
from pathlib import Path

from bigbatch.errors import InputError
from bigbatch.lm.files import os_reason, write_atomically
from bigbatch.lm.runs.file_names import REPORT

BEGINNING = b"<!doctype html>"


def check_place(path: Path) -> None:
    """Refuse a place where no page can be put; writes nothing.

    Raises:
        InputError: It is a folder or a file that is no page, or its folder is not there or not to be written in.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise InputError(f"--out {path} is a folder: name a file, such as {path / REPORT}.")
    if not folder.is_dir():
        raise InputError(f"--out {path} cannot be written: there is no folder {folder}.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written: {folder} is not yours to write in. Pass --out FILE.")
    with suppress(FileNotFoundError):
        if not _is_page(path):
            raise InputError(f"--out {path} is there and is no page: it would be lost. Name another file.")


def _is_page(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(BEGINNING)).lower() in (BEGINNING, b"")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"--out {path} cannot be read: {os_reason(error)}.") from error


def write_page(path: Path, page: str) -> int:
    """Put a page in its place at once: whoever opens it sees the one before or this one, whole; gives its bytes.

    Raises:
        InputError: It cannot be written; what was there stays.
    """
    data = page.encode("utf-8", "replace")
    try:
        write_atomically(path, data)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {os_reason(error)}.") from error
    return len(data)
