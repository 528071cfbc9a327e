"""List the files of a folder, or those that a pattern names, in an order that depends on their names only."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path

from bigbatch.errors import InputError, os_reason
from bigbatch.lm.files import file_kind


@dataclass(frozen=True)
class Listing:
    """Files of a folder.

    Attributes:
        files: Regular files, and links that lead nowhere, which cannot be opened; sorted by path.
        notes: Notes about what was left out.
        problems: What cannot be listed, each as a sentence.
    """

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def list_folder(root: Path) -> Listing:
    """List a folder recursively, without hidden entries, ``__pycache__`` and what is not a regular file."""
    files: list[Path] = []
    special: list[Path] = []
    problems: list[str] = []
    left_out = 0

    def note_error(error: OSError) -> None:
        problems.append(f"cannot read {error.filename}: {os_reason(error)}.")

    for folder, folders, names in os.walk(root, onerror=note_error):
        here = Path(folder)
        entries = {name: not name.startswith(".") and name != "__pycache__" for name in (*folders, *names)}
        for name in sorted(name for name in folders if entries[name] and (here / name).is_symlink()):
            problems.append(f"{here / name} is a link to a folder. Pass the folder itself, or remove the link.")
        left_out += sum(not included for included in entries.values())
        folders[:] = [name for name in folders if entries[name]]
        for path in (here / name for name in names if entries[name]):
            try:
                # A pipe or a device is never opened: reading it may wait for ever. A broken link is an error when read.
                (files if path.is_file() or not path.exists() else special).append(path)
            except OSError as error:  # in a folder whose names can be read and whose files cannot
                note_error(error)
    notes = []
    if left_out:
        notes.append(f"{left_out:,} hidden or __pycache__ {'entry' if left_out == 1 else 'entries'} left out")
    special.sort()
    if len(special) == 1:
        notes.append(f"{special[0]} is {file_kind(special[0])} and is left out")
    elif special:
        example = f"{special[0]}, {file_kind(special[0])}"
        notes.append(f"{len(special):,} entries that are not regular files are left out, such as {example}")
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    return Listing(tuple(files), tuple(notes), tuple(sorted(problems)))


def has_wildcard(name: str) -> bool:
    """Return whether a name is a pattern of file names."""
    return glob.has_magic(name)


def expand_pattern(pattern: str) -> Listing:
    """List the files that a pattern names, sorted; ``**`` stands for any folders, and folders are listed in full.

    Raises:
        InputError: There are none.
    """
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207  as given: relative or not
    files: list[Path] = []
    notes: list[str] = []
    problems: list[str] = []
    folders = [path for path in found if path.is_dir()] if "**" not in pattern else []
    for path in found:
        if path in folders:
            listing = list_folder(path)
            files += listing.files
            notes += listing.notes
            problems += listing.problems
        elif path.is_dir():
            continue
        elif path.is_file() or not path.exists():
            files.append(path)
        else:
            notes.append(f"{path} is {file_kind(path)} and is left out")
    if not files and not problems:
        raise InputError(
            f"no file matches the pattern {pattern!r}. Its folders must exist, and * matches no hidden file."
        )
    return Listing(tuple(dict.fromkeys(files)), tuple(notes), tuple(problems))
