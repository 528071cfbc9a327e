"""Lookup of run directories named on the command line, with a suggestion for a misspelled name."""

import difflib
from pathlib import Path

from bigbatch.errors import InputError


def check_run(run: Path) -> None:
    """Raise if a run directory does not exist.

    Raises:
        InputError: It does not exist; the message suggests the nearest name.
    """
    if run.is_dir():
        return
    siblings = [path.name for path in run.parent.iterdir()] if run.parent.is_dir() else []
    near = difflib.get_close_matches(run.name, siblings, n=1)
    hint = f"did you mean {run.parent / near[0]}?" if near else "create one with bigbatch train."
    raise InputError(f"run {run} does not exist: {hint}")
