"""Runs that the user names: found, or a sentence with the nearest one."""

import difflib
from pathlib import Path

from bigbatch.errors import InputError


def check_run(run: Path) -> None:
    """Refuse a run directory that is not there.

    Raises:
        InputError: It is not; the message has the nearest name beside it.
    """
    if run.is_dir():
        return
    siblings = [path.name for path in run.parent.iterdir()] if run.parent.is_dir() else []
    near = difflib.get_close_matches(run.name, siblings, n=1)
    hint = f"did you mean {run.parent / near[0]}?" if near else "bigbatch train makes one."
    raise InputError(f"there is no run {run}: {hint}")
