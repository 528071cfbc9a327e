"""The run directory: config.json, metrics.jsonl (one line an update, flushed), model/."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from bigbatch.errors import InputError


class RunDirectory:
    """A folder that holds one run and nothing else.

        with RunDirectory.create(path, config) as run:
            run.write_metrics({"step": 1, "loss": 8.3})

    Use `create`; it writes the configuration.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics: TextIO | None = None

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
            (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            _remove(path, made)
            raise InputError(_cannot_be_written(path, error)) from error
        return cls(path)

    @property
    def model(self) -> Path:
        """The folder of the trained model and its tokenizer."""
        return self.path / "model"

    def __enter__(self) -> "RunDirectory":
        self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def write_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one line and flush it; numbers that JSON cannot hold become null."""
        assert self._metrics is not None, "used outside its context"
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        self._metrics.write(json.dumps(finite) + "\n")
        self._metrics.flush()


def check_free(path: Path) -> None:
    """Refuse a folder that holds something, or that cannot be made where it is wanted; writes nothing.

    Raises:
        InputError: It does, or cannot.
    """
    try:
        if path.is_dir() and any(path.iterdir()):
            kind = "another run" if (path / "config.json").exists() else "other files"
            raise InputError(f"--out {path} holds {kind}: name a folder that is empty or not there yet.")
        place = next(place for place in (path, *path.absolute().parents) if place.exists())
    except OSError as error:
        raise InputError(_cannot_be_written(path, error)) from error
    if place == path and not path.is_dir():
        raise InputError(f"--out {path} is a file: name a folder that is empty or not there yet.")
    if not place.is_dir():
        raise InputError(f"--out {path} cannot be written: {place} is a file.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"--out {path} cannot be written: {place} is not yours to write in.")


def _remove(path: Path, made: list[Path]) -> None:
    """Take back what a failed `RunDirectory.create` made: the folders from ``path`` upwards that were not there."""
    with suppress(OSError):
        (path / "config.json").unlink(missing_ok=True)
    for folder in made:
        with suppress(OSError):
            folder.rmdir()


def _cannot_be_written(path: Path, error: OSError) -> str:
    return f"--out {path} cannot be written: {error.strerror or error}."


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
