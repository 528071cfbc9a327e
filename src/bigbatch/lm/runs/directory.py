"""Run directory: its manifest, config.json, lines in metrics.jsonl and quarantine.jsonl, checkpoints, model.

No file in it is opened through a link, and a file that something else links to is replaced by a copy before it changes.
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from bigbatch.errors import BigbatchError, InputError, os_reason
from bigbatch.lm.files import PARTIAL, check_regular, is_folder, open_regular, remove, write_atomically
from bigbatch.lm.runs.file_names import ADAPTER, CHECKPOINTS, CONFIG, IDENTITY, METRICS, MODEL, QUARANTINE
from bigbatch.lm.runs.identity import new_identity, read_identity, with_facts


class RunDirectory:
    """A folder that holds one run and nothing else. Make a new one with `create`, which writes the configuration.

    with RunDirectory.create(path, config) as run:
        run.write_metrics({"step": 1, "loss": 8.3})
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, BinaryIO] = {}

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> "RunDirectory":
        """Make the folder, and write run-manifest.json, with the facts of `record_facts` if known, and config.json.

        A failure leaves nothing behind.

        Raises:
            InputError: The folder is not empty or cannot be written.
        """
        check_free(path)
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            for leftover in filter(_is_leftover, path.iterdir()):
                remove(leftover)
            write_atomically(path / IDENTITY, new_identity(config, facts))
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
    def adapter(self) -> Path:
        """The folder of the trained LoRA adapters and the tokenizer, of a run that saves these and no model."""
        return self.path / ADAPTER

    @property
    def has_model(self) -> bool:
        """Whether a model or adapters were saved."""
        return self.model.is_dir() or self.adapter.is_dir()

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    def __enter__(self) -> "RunDirectory":
        for folder in (self.model, self.adapter):
            if os.path.lexists(folder) and not folder.is_symlink() and not is_folder(folder):
                raise BigbatchError(f"{folder} is not a folder, and the trained model is saved there. Rename it.")
        self._files = {METRICS: self._open(METRICS)}
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            with suppress(OSError):  # closing retries a failed write, which has raised before
                file.close()
        self._files = {}

    def record_facts(self, facts: Mapping[str, Any]) -> None:
        """Add the model and data of a new run to run-manifest.json, for a resume before the first checkpoint.

        Args:
            facts: As `bigbatch.lm.training.resume.run_facts` returns them.

        Raises:
            InputError: The file cannot be read or written.
        """
        try:
            write_atomically(self.path / IDENTITY, with_facts(read_identity(self.path), facts))
        except OSError as error:
            raise InputError(_cannot_be_written(self.path, error)) from error

    def discard_model(self) -> None:
        """Rename what was saved when the run was stopped, so that it is not taken for the final model.

        Raises:
            BigbatchError: The folder cannot be written.
        """
        for folder in (self.model, self.adapter):
            partial = folder.with_name(folder.name + PARTIAL)
            try:
                remove(partial)
                if is_folder(folder):
                    folder.rename(partial)
                else:
                    folder.unlink(missing_ok=True)  # a link, whose target stays
            except OSError as error:
                raise BigbatchError(f"{folder} cannot be written: {os_reason(error)}.") from error

    def write_metrics(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and flush it; NaN and infinity become null."""
        self._append(METRICS, row)

    def write_quarantine(self, row: Mapping[str, Any]) -> None:
        """Append one line about the samples of a skipped update to quarantine.jsonl and flush it."""
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
            return open_regular(self.path / name, "ab")
        except OSError as error:
            raise BigbatchError(f"{self.path / name} cannot be written: {os_reason(error)}.") from error

    def sync(self) -> tuple[int, int]:
        """Sync all lines to disk; return the sizes of metrics.jsonl and quarantine.jsonl in bytes."""
        try:
            for file in self._files.values():
                os.fsync(file.fileno())
        except OSError as error:
            raise BigbatchError(f"{self.path} cannot be written: {os_reason(error)}.") from error
        # Not file.tell(), which is the end of the last line that this process wrote, also after a truncation.
        sizes = {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}
        return sizes.get(METRICS, 0), sizes.get(QUARANTINE, 0)

    def truncate_to(self, metrics_bytes: int, quarantine_bytes: int) -> None:
        """Truncate both files to their sizes at a checkpoint, and open quarantine.jsonl if it is not empty.

        Raises:
            BigbatchError: A file is shorter than at the checkpoint, or cannot be truncated.
        """
        for name, num_bytes in ((METRICS, metrics_bytes), (QUARANTINE, quarantine_bytes)):
            path = self.path / name
            try:
                found_bytes = _size_of(path)
            except OSError as error:
                raise BigbatchError(f"{path} cannot be written: {os_reason(error)}.") from error
            if found_bytes < num_bytes:
                raise BigbatchError(
                    f"{path} has {found_bytes:,} bytes and had {num_bytes:,} at the checkpoint: lines are missing. "
                    "Restore the file."
                )
            try:
                if os.path.lexists(path):
                    with open_regular(path, "ab") as file:
                        os.truncate(file.fileno(), num_bytes)
            except OSError as error:
                raise BigbatchError(f"{path} cannot be written: {os_reason(error)}.") from error
            if num_bytes and self._files and name not in self._files:
                self._files[name] = self._open(name)


class ReadOnlyRunDirectory(RunDirectory):
    """Run directory of a process that writes nothing to it, because rank 0 does."""

    def __enter__(self) -> "RunDirectory":
        return self

    def discard_model(self) -> None:
        """Do nothing."""

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        """Do nothing."""

    def sync(self) -> tuple[int, int]:
        """Do nothing and return 0, 0."""
        return 0, 0

    def truncate_to(self, metrics_bytes: int, quarantine_bytes: int) -> None:
        """Do nothing."""


def size_of_lines(path: Path) -> int:
    """Return the bytes of a file of lines; 0 if it does not exist.

    Raises:
        InputError: It is a link or no regular file.
    """
    try:
        return _size_of(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {os_reason(error)}.") from error


def _size_of(path: Path) -> int:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return 0
    check_regular(path, status)
    return status.st_size


def as_line(row: Mapping[str, Any]) -> bytes:
    """Return a row as a line of JSON; NaN and infinity become null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    return (json.dumps(finite) + "\n").encode()


def check_free(path: Path) -> None:
    """Check that a folder is empty or can be made: creates a folder in the nearest one that exists, and removes it.

    Raises:
        InputError: It is not empty or cannot be made.
    """
    try:
        if path.is_dir() and not all(map(_is_leftover, path.iterdir())):
            run = os.path.lexists(path / CONFIG) and not any(path.glob("*.safetensors"))  # else it is a model folder
            resume = f", or continue it: bigbatch resume {path}" if run else ""
            raise InputError(
                f"--out {path} holds {'another run' if run else 'other files'}: name a new or empty folder{resume}."
            )
        parent = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    except OSError as error:
        raise InputError(_cannot_be_written(path, error)) from error
    if parent == path and not path.is_dir():
        raise InputError(f"--out {path} is a file: name a new or empty folder.")
    if not parent.is_dir():
        raise InputError(f"--out {path} cannot be written: {parent} is a file.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"--out {path} cannot be written: {parent} is not writable.")
    try:  # some file systems, such as /proc, allow root to write and create nothing
        Path(tempfile.mkdtemp(prefix=f"{CONFIG}.", suffix=PARTIAL, dir=parent)).rmdir()  # a leftover if killed here
    except OSError as error:
        raise InputError(_cannot_be_written(path, error)) from error


def _is_leftover(path: Path) -> bool:
    """Return whether a file is what a killed `RunDirectory.create` left: it writes config.json last."""
    if path.name == IDENTITY:
        return not os.path.lexists(path.with_name(CONFIG))
    return path.name.startswith((f"{CONFIG}.", f"{IDENTITY}.")) and path.name.endswith(PARTIAL)


def _remove(path: Path, made: list[Path]) -> None:
    """Remove what a failed `RunDirectory.create` made: its two files and the folders that did not exist before."""
    for name in (CONFIG, IDENTITY):
        with suppress(OSError):
            (path / name).unlink(missing_ok=True)
    for folder in made:
        with suppress(OSError):
            folder.rmdir()


def _cannot_be_written(path: Path, error: OSError) -> str:
    return f"--out {path} cannot be written: {os_reason(error)}."


def default_path(model: str, data: Sequence[str]) -> Path:
    """Return runs/MODEL-DATA, or the first of runs/MODEL-DATA-2, -3 … that does not exist.

    DATA is the first of several sources, with the number of the others.
    """
    more = f"-and-{len(data) - 1}-more" if len(data) > 1 else ""
    name = f"{Path(model).stem or 'run'}-{_short_data(data[0])}{more}"
    path = Path("runs") / name
    number = 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path


def _short_data(name: str) -> str:
    """Return the name of a source without suffixes and, of a pattern, without its wildcards."""
    parts = [re.sub(r"(\.(gz|bz2|xz|zst))$", "", part) for part in Path(name).parts]
    words = [re.sub(r"\{\w+\.\.\w+\}|[*?\[\]!]+", "", Path(part).stem).strip("-_. ") for part in parts if part != "/"]
    return next((word for word in reversed(words) if word), "run")
