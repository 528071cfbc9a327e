"""The run directory: config.json, metrics.jsonl (one line an update, flushed), quarantine.jsonl, checkpoints, model."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from bigbatch.errors import BigbatchError, InputError
from bigbatch.lm.files import PARTIAL, os_reason, write_atomically
from bigbatch.lm.runs.file_names import CHECKPOINTS, CONFIG, METRICS, MODEL, QUARANTINE


class RunDirectory:
    """A folder that holds one run and nothing else.

        with RunDirectory.create(path, config) as run:
            run.write_metrics({"step": 1, "loss": 8.3})

    Use `create`; it writes the configuration.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, BinaryIO] = {}

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> "RunDirectory":
        """Make the folder and write config.json; a failure leaves nothing behind.

        Raises:
            InputError: It holds something already, or cannot be written.
        """
        check_free(path)
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            for leftover in filter(_is_partial_config, path.iterdir()):
                leftover.unlink()
            write_atomically(path / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        except OSError as error:
            _remove(path, made)
            raise InputError(_cannot_be_written(path, error)) from error
        return cls(path)

    @property
    def model(self) -> Path:
        """The folder of the trained model and its tokenizer."""
        return self.path / MODEL

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    def __enter__(self) -> "RunDirectory":
        self._files = {METRICS: self._open(METRICS)}
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            with suppress(OSError):  # closing tries once more to write what could not be written, which was told
                file.close()
        self._files = {}

    def discard_model(self) -> None:
        """Take its name from a model that was saved when the run was stopped.

        Raises:
            BigbatchError: The folder cannot be written.
        """
        aside = self.model.with_name(self.model.name + PARTIAL)
        shutil.rmtree(aside, ignore_errors=True)
        try:
            with suppress(FileNotFoundError):
                self.model.rename(aside)
        except OSError as error:
            raise BigbatchError(f"{self.model} cannot be written: {os_reason(error)}.") from error

    def write_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one line and flush it; numbers that JSON cannot hold become null."""
        self._append(METRICS, row)

    def write_quarantine(self, row: Mapping[str, Any]) -> None:
        """Append one line about samples that changed nothing, and flush it."""
        self._append(QUARANTINE, row)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        assert self._files, "used outside its context"
        if name not in self._files:
            self._files[name] = self._open(name)
        try:
            self._files[name].write(as_line(row))
            self._files[name].flush()
        except OSError as error:
            raise BigbatchError(f"{self.path / name} cannot be written: {os_reason(error)}.") from error

    def _open(self, name: str) -> BinaryIO:
        try:
            return (self.path / name).open("ab")
        except OSError as error:
            raise BigbatchError(f"{self.path / name} cannot be written: {os_reason(error)}.") from error

    def sync(self) -> tuple[int, int]:
        """Bring all lines to the disk; give the bytes of metrics.jsonl and of quarantine.jsonl."""
        try:
            for file in self._files.values():
                os.fsync(file.fileno())
        except OSError as error:
            raise BigbatchError(f"{self.path} cannot be written: {os_reason(error)}.") from error
        # Not tell(): it is where the last line ended that this process wrote, also after the file was cut.
        sizes = {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}
        return sizes.get(METRICS, 0), sizes.get(QUARANTINE, 0)

    def truncate_to(self, metrics_bytes: int, quarantine_bytes: int) -> None:
        """Cut the lines off that were written after a point of the run; opens what is left of them.

        Raises:
            BigbatchError: There are fewer than were there at that point, or they cannot be cut.
        """
        for name, num_bytes in ((METRICS, metrics_bytes), (QUARANTINE, quarantine_bytes)):
            path = self.path / name
            there = path.stat().st_size if path.exists() else 0
            if there < num_bytes:
                raise BigbatchError(
                    f"{path} has {there:,} bytes, and had {num_bytes:,} when the checkpoint was made: lines are "
                    "missing. Put the file back."
                )
            try:
                if path.exists():
                    os.truncate(path, num_bytes)
            except OSError as error:
                raise BigbatchError(f"{path} cannot be written: {os_reason(error)}.") from error
            if num_bytes and self._files and name not in self._files:
                self._files[name] = self._open(name)


class ReadOnlyRunDirectory(RunDirectory):
    """The folder of a run that another process writes to: nothing is written from here."""

    def __enter__(self) -> "RunDirectory":
        return self

    def discard_model(self) -> None:
        """Do nothing."""

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        """Do nothing."""

    def sync(self) -> tuple[int, int]:
        """Do nothing; what is written is not this process's to count."""
        return 0, 0

    def truncate_to(self, metrics_bytes: int, quarantine_bytes: int) -> None:
        """Do nothing."""


def as_line(row: Mapping[str, Any]) -> bytes:
    """Write a row as a line of JSON; numbers that it cannot hold become null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    return (json.dumps(finite) + "\n").encode()


def check_free(path: Path) -> None:
    """Refuse a folder that holds something, or that cannot be made where it is wanted; writes nothing.

    Raises:
        InputError: It does, or cannot.
    """
    try:
        if path.is_dir() and not all(map(_is_partial_config, path.iterdir())):
            run = (path / CONFIG).exists()
            go_on = f", or go on with it: bigbatch resume {path}" if run else ""
            raise InputError(
                f"--out {path} holds {'another run' if run else 'other files'}: name a folder that is empty or not "
                f"there yet{go_on}."
            )
        place = next(place for place in (path, *path.absolute().parents) if place.exists())
    except OSError as error:
        raise InputError(_cannot_be_written(path, error)) from error
    if place == path and not path.is_dir():
        raise InputError(f"--out {path} is a file: name a folder that is empty or not there yet.")
    if not place.is_dir():
        raise InputError(f"--out {path} cannot be written: {place} is a file.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"--out {path} cannot be written: {place} is not yours to write in.")


def _is_partial_config(path: Path) -> bool:
    """Return whether a file is what a killed `RunDirectory.create` left."""
    return path.name.startswith(f"{CONFIG}.") and path.name.endswith(PARTIAL)


def _remove(path: Path, made: list[Path]) -> None:
    """Remove what a failed `RunDirectory.create` made: the configuration and the folders that did not exist before."""
    with suppress(OSError):
        (path / CONFIG).unlink(missing_ok=True)
    for folder in made:
        with suppress(OSError):
            folder.rmdir()


def _cannot_be_written(path: Path, error: OSError) -> str:
    return f"--out {path} cannot be written: {os_reason(error)}."


def default_path(model: str, data: str) -> Path:
    """Give runs/MODEL-DATA, or the first of runs/MODEL-DATA-2, -3 … that is not there yet."""
    name = f"{_short(model)}-{_short(data)}"
    path = Path("runs") / name
    number = 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path


def _short(name: str) -> str:
    return Path(name).stem or "run"
