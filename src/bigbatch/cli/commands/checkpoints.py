"""``bigbatch checkpoints``: list and verify the checkpoints of a run, as lines or one JSON object."""

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from bigbatch.cli.console import make_console, progress_display
from bigbatch.cli.options import CheckpointsOptions
from bigbatch.cli.run_lookup import check_run, check_run_files
from bigbatch.errors import InputError
from bigbatch.lm.checkpoint.catalog import CheckpointInfo, examine, numbered
from bigbatch.lm.runs.file_names import CHECKPOINTS, CONFIG, IDENTITY
from bigbatch.lm.runs.identity import read_identity
from bigbatch.memory.limit import describe_bytes

SOME_WHOLE = 0
NONE_WHOLE = 1


def run(options: CheckpointsOptions) -> int:
    """Verify and list the checkpoints; return 0 only if at least one is whole."""
    check_run(options.run)
    check_run_files(options.run)
    folder = options.run / CHECKPOINTS
    console, notes = make_console(), make_console(stderr=True)
    with progress_display(console if not options.as_json else notes if notes.is_terminal else None) as progress:
        checkpoints = []
        paths = numbered(folder)
        run_id = _run_id(options.run)
        for done, path in enumerate(paths):
            progress("verifying checkpoints", done, len(paths))
            checkpoint = examine(path, run_id=run_id)
            checkpoints += [] if checkpoint is None else [checkpoint]
    if not checkpoints:
        raise InputError(f"{options.run} has no checkpoint yet: a run saves them in {folder}.")
    if options.as_json:
        console.print(json.dumps(as_json(options.run, checkpoints)))
    else:
        for line in describe(checkpoints):
            console.print(line)
    return SOME_WHOLE if newest_whole(checkpoints) is not None else NONE_WHOLE


def _run_id(run: Path) -> str | None:
    """Return the identifier of a run; None for a folder of checkpoints without a configuration."""
    if os.path.lexists(run / IDENTITY) or os.path.lexists(run / CONFIG):
        return read_identity(run).run_id
    return None


def newest_whole(checkpoints: list[CheckpointInfo]) -> CheckpointInfo | None:
    """Return the newest checkpoint that is whole; None if there is none."""
    return next((checkpoint for checkpoint in reversed(checkpoints) if checkpoint.reason is None), None)


def describe(checkpoints: list[CheckpointInfo]) -> list[str]:
    """Return one line per checkpoint, the newest last, and a line with the one that a run would resume from."""
    width = max(len(checkpoint.path.name) for checkpoint in checkpoints)
    lines = [
        f"{checkpoint.path.name:<{width}}{describe_bytes(checkpoint.num_bytes):>12}  "
        f"{_local(checkpoint.written_at)}  {_verdict(checkpoint)}"
        for checkpoint in checkpoints
    ]
    newest = newest_whole(checkpoints)
    last = "no checkpoint is whole" if newest is None else f"newest whole checkpoint: {newest.path.name}"
    return [*lines, last]


def as_json(folder: Path, checkpoints: list[CheckpointInfo]) -> dict[str, Any]:
    """Convert the list to JSON values; times are in UTC."""
    newest = newest_whole(checkpoints)
    return {
        "run": str(folder),
        "newest_whole_step": None if newest is None else newest.step,
        "checkpoints": [
            {
                "step": checkpoint.step,
                "bytes": checkpoint.num_bytes,
                "written_at": None if checkpoint.written_at is None else checkpoint.written_at.isoformat(),
                "whole": checkpoint.reason is None,
                "reason": checkpoint.reason,
            }
            for checkpoint in checkpoints
        ],
    }


def _verdict(checkpoint: CheckpointInfo) -> str:
    return "whole" if checkpoint.reason is None else f"NOT whole: {checkpoint.reason}"


def _local(written_at: datetime | None) -> str:
    if written_at is None:
        return f"{'time unknown':<19}"
    return written_at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
