"""Read a run directory: complete or not, running or not, written by this version or another."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bigbatch.errors import BigbatchError, InputError, os_reason
from bigbatch.lm.config.objective_fields import LOSS_UNITS
from bigbatch.lm.files import LARGEST_LOG, open_regular, read_regular
from bigbatch.lm.report.metrics_table import Columns, read_columns
from bigbatch.lm.runs.file_names import ADAPTER, CONFIG, EVENTS, LOCK, METRICS, MODEL, TUNED_MICROBATCH, VERIFICATION
from bigbatch.lm.runs.identity import check_layout
from bigbatch.lm.runs.samples import Sample, read_samples
from bigbatch.lm.text import SAMPLE_NOUNS

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

State = Literal["running", "finished", "stopped", "failed", "ended"]
ENDS: Mapping[Any, State] = {"finished": "finished", "stopped": "stopped", "failed": "failed"}


@dataclass(frozen=True)
class Run:
    """Content of a run directory.

    Attributes:
        folder: Its directory.
        name: The directory's own name.
        state: ``running``: a process holds the lock; ``finished``; ``stopped`` by a signal; ``failed`` with an error;
            ``ended``: no process runs and none recorded its end, as after a kill.
        settings: Those of config.json with the changes of the last resume.
        changed: Names of the settings that the last resume changed.
        columns: The updates.
        events: Lines of events.jsonl.
        choice: The micro-batch that ``auto`` chose, with its predicted peak; empty if none was chosen.
        samples: Texts that the model generated, by update.
        verification: The output of ``bigbatch verify --json`` in verify.json; empty without that file.
    """

    folder: Path
    name: str
    state: State
    settings: Mapping[str, Any]
    changed: frozenset[str]
    columns: Columns
    events: Sequence[Mapping[str, Any]]
    choice: Mapping[str, Any]
    verification: Mapping[str, Any]
    samples: Sequence[Sample] = ()

    @property
    def loss_unit(self) -> str:
        """What the loss is measured in; empty for a loss function of the user's own."""
        if self.last_event_value("loss_fn"):
            return ""
        objective = str(self.settings.get("objective", "sft"))
        return "per pair" if self.settings.get("dpo_loss") == "ipo" else LOSS_UNITS.get(objective, "")

    @property
    def noun(self) -> str:
        """What a sample is."""
        return SAMPLE_NOUNS.get(str(self.settings.get("objective")), "sequence")

    @property
    def is_on_cuda(self) -> bool:
        """Whether memory was measured as torch's allocations on a GPU; elsewhere it is that of the whole process."""
        device = self.last_event_value("device") or self.settings.get("device", "")
        return str(device).startswith("cuda")

    @property
    def steps(self) -> int:
        """Updates done."""
        return self.columns.steps[-1] if self.columns.steps else 0

    @property
    def total_steps(self) -> int | None:
        """Updates of the whole run; None if unknown."""
        recorded = self.last_event_value("total_steps")
        total = self.settings.get("steps") if recorded is None else recorded
        return total if type(total) is int else None

    def last_event_value(self, name: str) -> Any:
        """Return the value in the last event that has one under this name; None without such an event."""
        return next((event[name] for event in reversed(self.events) if event.get(name) is not None), None)

    @property
    def resumes(self) -> list[Mapping[str, Any]]:
        """Events of processes that resumed the run."""
        return [event for event in self.events if event.get("event") == "resume"]


def read_run(folder: Path) -> Run:
    """Read a run directory; missing files are empty.

    Raises:
        InputError: The folder is not a run directory.
        BigbatchError: A file in it cannot be read.
    """
    check_layout(folder)
    stored = _object(folder / CONFIG)
    if not stored and not (folder / CONFIG).is_file() and not (folder / METRICS).is_file():
        raise InputError(f"{folder} is not a run: it has neither {CONFIG} nor {METRICS}.")
    running = is_running(folder)  # before the metrics are read: a run that ends in between is reported as running
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
        verification=_object(folder / VERIFICATION),
        samples=read_samples(folder),
    )


def is_running(folder: Path) -> bool:
    """Return whether a process holds the lock of the run directory."""
    path = folder / LOCK
    try:
        if not path.lstat().st_size:  # the holder writes its process id
            return False
        if fcntl is None:
            return True
        with open_regular(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _state(folder: Path, stored: Mapping[str, Any], columns: Columns, events: Sequence[Mapping[str, Any]]) -> State:
    last = events[-1].get("event") if events else None
    if isinstance(last, str) and last in ENDS:
        return ENDS[last]
    steps = columns.steps[-1] if columns.steps else 0
    has_model = (folder / MODEL).is_dir() or (folder / ADAPTER).is_dir()
    has_ended = not events and has_model and stored.get("steps") in (steps, None)
    return "finished" if steps and has_ended else "ended"


def _changed(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    settings = next((event.get("settings") for event in reversed(events) if event.get("event") == "resume"), None)
    return dict(settings) if isinstance(settings, dict) else {}


def _lines(path: Path) -> list[Mapping[str, Any]]:
    try:
        data = read_regular(path, limit=LARGEST_LOG)
    except FileNotFoundError:
        return []
    found: list[Mapping[str, Any]] = []
    for line in data.splitlines():
        with suppress(ValueError, RecursionError):
            row = _parsed(line)
            if isinstance(row, dict):
                found.append(row)
    return found


def _object(path: Path) -> dict[str, Any]:
    """Read a JSON object; anything else is empty."""
    with suppress(OSError, ValueError, RecursionError):
        found = _parsed(read_regular(path))
        if isinstance(found, dict):
            return found
    return {}


def _parsed(data: bytes) -> Any:
    """Parse JSON; whole numbers of twenty digits or more become floats, which no figure shows exactly anyway."""
    return json.loads(data, parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits))


def size_of_metrics(folder: Path) -> int:
    """Return the bytes of metrics.jsonl; 0 without that file."""
    with suppress(OSError):
        return (folder / METRICS).lstat().st_size
    return 0
