"""Write a page atomically, and never over a file that is not a page."""

import os
from contextlib import suppress
from pathlib import Path

from bigbatch.errors import InputError, os_reason
from bigbatch.lm.files import file_kind, open_regular, write_atomically
from bigbatch.lm.runs.file_names import REPORT

DOCTYPE = b"<!doctype html>"


def check_place(path: Path) -> None:
    """Check that a page can be written to a path; writes nothing.

    Raises:
        InputError: It is a folder or a file that is not a page, or its folder does not exist or is not writable.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise InputError(f"--out {path} is a folder: name a file, such as {path / REPORT}.")
    if path.exists() and not path.is_file():  # opening a pipe may wait for ever
        raise InputError(f"--out {path} is {file_kind(path)}: name a file, such as {REPORT}.")
    if not folder.is_dir():
        raise InputError(f"--out {path} cannot be written: there is no folder {folder}.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written: {folder} is not writable. Pass --out FILE.")
    with suppress(FileNotFoundError):
        if not _is_page(path):
            raise InputError(f"--out {path} exists and is not a report: it would be overwritten. Name another file.")


def _is_page(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(len(DOCTYPE)).lower() in (DOCTYPE, b"")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"--out {path} cannot be read: {os_reason(error)}.") from error


def write_page(path: Path, page: str) -> int:
    """Write a page atomically, so that readers see the previous page or the new one; return its size in bytes.

    Raises:
        InputError: It cannot be written; the previous page stays.
    """
    data = page.encode("utf-8", "replace")
    try:
        write_atomically(path, data)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {os_reason(error)}.") from error
    return len(data)
