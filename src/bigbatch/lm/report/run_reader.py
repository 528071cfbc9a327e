"""A run directory as it lies there: whole or not, running or not, of this version or another."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bigbatch.errors import BigbatchError, InputError
from bigbatch.lm.files import os_reason
from bigbatch.lm.report.metrics_table import Columns, read_columns
from bigbatch.lm.runs.file_names import CONFIG, EVENTS, LOCK, METRICS, MODEL, TUNED_MICROBATCH, VERIFICATION

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

State = Literal["running", "finished", "stopped", "failed", "ended"]
ENDS: Mapping[Any, State] = {"finished": "finished", "stopped": "stopped", "failed": "failed"}


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
        folder: Its directory.
        name: The directory's own name.
        state: ``running``: a process holds it now; ``finished``; ``stopped`` by a signal; ``failed`` with an error;
            ``ended``: without a word, as processes that are killed do.
        settings: Those of config.json, as they were changed since.
        changed: Names of the settings that are others than in config.json.
        columns: The updates.
        events: Lines of events.jsonl.
        choice: The micro-batch that was chosen, with the peak that was predicted; empty where none was.
        proof: What ``bigbatch verify --json`` printed, where it was kept in verify.json; empty otherwise.
    """

    folder: Path
    name: str
    state: State
    settings: Mapping[str, Any]
    changed: frozenset[str]
    columns: Columns
    events: Sequence[Mapping[str, Any]]
    choice: Mapping[str, Any]
    proof: Mapping[str, Any]

    @property
    def steps(self) -> int:
        """Updates that are made."""
        return self.columns.steps[-1] if self.columns.steps else 0

    @property
    def total_steps(self) -> int | None:
        """Updates of the whole run; None where nothing tells."""
        told = self.last_event_value("total_steps")
        total = self.settings.get("steps") if told is None else told
        return total if type(total) is int else None

    def last_event_value(self, name: str) -> Any:
        """Give what the last process that began said of something; None where none did."""
        return next((event[name] for event in reversed(self.events) if event.get(name) is not None), None)

    @property
    def resumes(self) -> list[Mapping[str, Any]]:
        """The processes that went on with it."""
        return [event for event in self.events if event.get("event") == "resume"]


def read_run(folder: Path) -> Run:
    """Read what there is of a run.

    Raises:
        InputError: The folder is no run directory.
        BigbatchError: Something in it cannot be read.
    """
    stored = _object(folder / CONFIG)
    if not stored and not (folder / CONFIG).is_file() and not (folder / METRICS).is_file():
        raise InputError(f"{folder} is no run: it holds neither {CONFIG} nor {METRICS}.")
    running = is_running(folder)  # before the metrics are read: what ends in between is told as running
    try:
        columns = read_columns(folder / METRICS)
        events = _lines(folder / EVENTS)
    except OSError as error:
        raise BigbatchError(f"{error.filename or folder} cannot be read: {os_reason(error)}.") from error
    changed = _changed(events)
    return Run(
        folder=folder,
        name=folder.resolve().name or str(folder),
        state="running" if running else _state(folder, stored, columns, events),
        settings={**stored, **changed},
        changed=frozenset(changed),
        columns=columns,
        events=events,
        choice=_object(folder / TUNED_MICROBATCH),
        proof=_object(folder / VERIFICATION),
    )


def is_running(folder: Path) -> bool:
    """Tell whether a process holds the run directory now."""
    path = folder / LOCK
    try:
        if not path.stat().st_size:  # whoever holds it has written its name
            return False
        if fcntl is None:
            return True
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _state(folder: Path, stored: Mapping[str, Any], columns: Columns, events: Sequence[Mapping[str, Any]]) -> State:
    last = events[-1].get("event") if events else None
    if last in ENDS:
        return ENDS[last]
    made = columns.steps[-1] if columns.steps else 0
    whole = not events and (folder / MODEL).is_dir() and stored.get("steps") in (made, None)
    return "finished" if made and whole else "ended"


def _changed(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    settings = next((event.get("settings") for event in reversed(events) if event.get("event") == "resume"), None)
    return dict(settings) if isinstance(settings, dict) else {}


def _lines(path: Path) -> list[Mapping[str, Any]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    found: list[Mapping[str, Any]] = []
    for line in data.splitlines():
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict):
                found.append(row)
    return found


def _object(path: Path) -> dict[str, Any]:
    """Read a JSON object; what is there and is none counts as not there."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
    return {}


def size_of_metrics(folder: Path) -> int:
    """Give the bytes of metrics.jsonl; 0 where there is none."""
    with suppress(OSError):
        return (folder / METRICS).stat().st_size
    return 0
