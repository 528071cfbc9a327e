"""``bigbatch checkpoints``: which checkpoints a run has, and which of them are whole; or one JSON object of it."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from bigbatch.cli.console import make_console, progress_display
from bigbatch.cli.options import CheckpointsOptions
from bigbatch.cli.run_lookup import check_run
from bigbatch.errors import InputError
from bigbatch.lm.checkpoint.catalog import CheckpointInfo, examine, numbered
from bigbatch.lm.runs.file_names import CHECKPOINTS
from bigbatch.memory.limit import describe_bytes

SOME_WHOLE = 0
NONE_WHOLE = 1


def run(options: CheckpointsOptions) -> int:
    """Verify and list; return 0 only if at least one checkpoint is whole."""
    check_run(options.run)
    folder = options.run / CHECKPOINTS
    console, notes = make_console(), make_console(stderr=True)
    with progress_display(console if not options.as_json else notes if notes.is_terminal else None) as progress:
        found = []
        paths = numbered(folder)
        for done, path in enumerate(paths):
            progress("verifying checkpoints", done, len(paths))
            kept = examine(path)
            found += [] if kept is None else [kept]
    if not found:
        raise InputError(f"{options.run} has no checkpoint yet: a run writes them to {folder}.")
    if options.as_json:
        console.print(json.dumps(as_json(options.run, found)))
    else:
        for line in describe(found):
            console.print(line)
    return SOME_WHOLE if newest_whole(found) is not None else NONE_WHOLE


def newest_whole(found: list[CheckpointInfo]) -> CheckpointInfo | None:
    """Give the last one that is whole."""
    return next((kept for kept in reversed(found) if kept.reason is None), None)


def describe(found: list[CheckpointInfo]) -> list[str]:
    """Give a line for each checkpoint, the newest last, and one about where a run would go on."""
    width = max(len(kept.path.name) for kept in found)
    lines = [
        f"{kept.path.name:<{width}}{describe_bytes(kept.num_bytes):>12}  {_local(kept.written_at)}  {_verdict(kept)}"
        for kept in found
    ]
    newest = newest_whole(found)
    last = "none of them is whole" if newest is None else f"the newest whole one is {newest.path.name}"
    return [*lines, last]


def as_json(folder: Path, found: list[CheckpointInfo]) -> dict[str, Any]:
    """Turn the list into what JSON can hold; times are in UTC."""
    newest = newest_whole(found)
    return {
        "run": str(folder),
        "newest_whole_step": None if newest is None else newest.step,
        "checkpoints": [
            {
                "step": kept.step,
                "bytes": kept.num_bytes,
                "written_at": None if kept.written_at is None else kept.written_at.isoformat(),
                "whole": kept.reason is None,
                "reason": kept.reason,
            }
            for kept in found
        ],
    }


def _verdict(kept: CheckpointInfo) -> str:
    return "whole" if kept.reason is None else f"NOT whole: {kept.reason}"


def _local(written_at: datetime | None) -> str:
    if written_at is None:
        return f"{'time unknown':<19}"
    return written_at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
