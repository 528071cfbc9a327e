"""The manifest of a checkpoint: the name, size and SHA-256 of every file, and a digest of its own.

content → canonical JSON → SHA-256 → manifest.json, valid only if writing its content again gives the same bytes
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from bigbatch.lm.files import parse_json

FORMAT = 1
FILE = "manifest.json"

_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\.(safetensors|json)", re.ASCII)


class NewerFormatError(ValueError):
    """A manifest that a newer bigbatch wrote."""


@dataclass(frozen=True)
class Stamp:
    """The size of a file in bytes and its SHA-256 in hex."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint.

    Attributes:
        version: Version of bigbatch that wrote it.
        step: Number of updates done.
        run_id: Identifier of the run that wrote it.
        written_at: Time of writing in UTC, to the second.
        files: Size and SHA-256 of each file by name, without the manifest.
    """

    version: str
    step: int
    run_id: str
    written_at: datetime
    files: Mapping[str, Stamp]

    def to_bytes(self) -> bytes:
        """Return the file as indented JSON, with the SHA-256 of its canonical content as ``digest``."""
        content = {
            "format": FORMAT,
            "bigbatch": self.version,
            "step": self.step,
            "run_id": self.run_id,
            "written_at": self.written_at.isoformat(timespec="seconds"),
            "files": {
                name: {"bytes": stamp.num_bytes, "sha256": stamp.sha256} for name, stamp in sorted(self.files.items())
            },
        }
        return json.dumps({**content, "digest": _digest(content)}, indent=2).encode("ascii") + b"\n"


def _digest(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def parse(data: bytes) -> Manifest:
    """Parse the output of `Manifest.to_bytes`.

    Raises:
        NewerFormatError: It is intact and of a newer format.
        ValueError: It is anything else; the message is a clause that begins with ``manifest.json``.
    """
    try:
        content = parse_json(data)
    except ValueError:
        raise ValueError(f"{FILE} is not JSON") from None
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"{FILE} is not the manifest of a checkpoint")
    if content["format"] != FORMAT:
        shown = repr(content["format"])
        kind = NewerFormatError if _is_newer(content) else ValueError
        raise kind(f"{FILE} has format {shown[:40]}, and this bigbatch reads format {FORMAT}")
    try:
        manifest = _from_content(content)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"{FILE} is damaged") from None
    if manifest.to_bytes() != data:
        raise ValueError(f"{FILE} differs from what was written (SHA-256)")
    return manifest


def _is_newer(content: Mapping[str, Any]) -> bool:
    """Return whether content with another format is intact, and not format 1 with a damaged number."""
    unsigned = {name: value for name, value in content.items() if name != "digest"}
    is_later = type(content["format"]) is int and content["format"] > FORMAT
    return is_later and content.get("digest") == _digest(unsigned)


def _from_content(content: Mapping[str, Any]) -> Manifest:
    files = {_file_name(name): Stamp(_whole(file["bytes"]), _text(file["sha256"])) for name, file in _items(content)}
    return Manifest(
        version=_text(content["bigbatch"]),
        step=_whole(content["step"]),
        run_id=_text(content["run_id"]),
        written_at=datetime.fromisoformat(_text(content["written_at"])),
        files=files,
    )


def _items(content: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if not isinstance(content["files"], dict):
        raise TypeError
    return list(content["files"].items())


def _file_name(name: str) -> str:
    if name == FILE or not _FILE_NAME.fullmatch(name):  # never a path out of the folder
        raise ValueError
    return name


def is_part_name(name: str) -> bool:
    """Return whether a checkpoint can hold a file of this name."""
    return _FILE_NAME.fullmatch(name) is not None


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def file_name(name: str, ending: str) -> str:
    """Return the file name of a part: ``model`` and ``safetensors`` → ``model.safetensors``.

    Raises:
        ValueError: The name is not unique on every file system, or is that of the manifest.
    """
    file = f"{name}.{ending}"
    if file == FILE or not _FILE_NAME.fullmatch(file):
        raise ValueError(
            f"a part of a checkpoint cannot be called {name!r}: take up to 64 of a-z, 0-9, - and _, and not manifest."
        )
    return file
