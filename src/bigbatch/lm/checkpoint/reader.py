"""Read a checkpoint; the bytes that are verified are the ones that are loaded."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from os import fstat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbatch.errors import CheckpointError
from bigbatch.lm.checkpoint.integrity import IntegrityError, check_digest, check_size, opened, verified_manifest
from bigbatch.lm.checkpoint.manifest import Stamp
from bigbatch.lm.files import parse_json

if TYPE_CHECKING:
    from torch import Tensor

    from bigbatch.lm.checkpoint.shards import ShardInfo


@dataclass(frozen=True, eq=False)
class Contents:
    """The contents of a checkpoint; compared by identity.

    Attributes:
        step: Number of updates done.
        run_id: Identifier of the run that wrote it.
        stamps: Size and SHA-256 of each file, from the manifest.
        tensors: By part, then by name; on the CPU, each with its own storage.
        values: By part.
    """

    step: int
    run_id: str
    stamps: Mapping[str, Stamp]
    tensors: "Mapping[str, Mapping[str, Tensor]]"
    values: Mapping[str, Any]


def read(path: Path, *, parts: Collection[str] | None = None) -> Contents:
    """Load a checkpoint onto the CPU.

        bytes = the file, once → size and SHA-256 of these bytes → tensors or values of these bytes

    so a file that changes in between is detected. Peak memory is the whole content plus its largest file. Shards that
    several ranks wrote are joined to whole tensors.

    Args:
        path: The folder ``…/step-N``.
        parts: Parts whose tensors are read, None for all; files of other tensors are not read.

    Raises:
        CheckpointError: It is invalid; the message names the file and the reason.
    """
    tensors: dict[str, Mapping[str, Tensor]] = {}
    values, shards = {}, _Shards()
    try:
        manifest = verified_manifest(path)
        for name, stamp in manifest.files.items():
            part, _, ending = name.rpartition(".")
            if parts is not None and ending != "json" and _base_part(name) not in parts:
                continue
            data = checked_bytes(path, name, stamp)
            if ending == "json":
                values[part] = parsed(name, data)
            elif not shards.add(name, named := _tensors(name, data), data):
                tensors[part] = named
        tensors |= shards.joined()
    except IntegrityError as reason:
        raise CheckpointError(f"checkpoint {path} cannot be used: {reason}.") from reason
    return Contents(manifest.step, manifest.run_id, manifest.files, tensors, values)


def _base_part(file: str) -> str:
    """Return the part of a file that contains whole tensors or the shards of one rank."""
    from bigbatch.lm.checkpoint.shards import is_piece, part_of  # imports torch

    return part_of(file) if is_piece(file) else file.rpartition(".")[0]


class _Shards:
    """Shards of tensors, by part and name, until all have been read."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[str, list[tuple[ShardInfo, Tensor]]]] = {}

    def add(self, file: str, tensors: "Mapping[str, Tensor]", data: bytes) -> bool:
        """Store the tensors of a file if they are shards; return whether they are."""
        from bigbatch.lm.checkpoint.safetensors_file import read_notes
        from bigbatch.lm.checkpoint.shards import from_header, part_of  # imports torch

        places = from_header(file, read_notes(data), tensors)
        if places is None:
            return False
        part = self._parts.setdefault(part_of(file), {})
        for name, piece in tensors.items():
            part.setdefault(name, []).append((places[name], piece))
        return True

    def joined(self) -> "dict[str, dict[str, Tensor]]":
        """Join the shards, one tensor at a time; the shards of a joined tensor are freed."""
        if not self._parts:
            return {}
        from bigbatch.lm.checkpoint.shards import join_shards  # imports torch

        return {
            part: {name: join_shards(name, named.pop(name)) for name in list(named)}
            for part, named in self._parts.items()
        }


def checked_bytes(path: Path, name: str, stamp: Stamp) -> bytes:
    """Read a file of a checkpoint once and verify its bytes.

    Raises:
        IntegrityError: It differs from the manifest.
    """
    with opened(path, name) as file:
        check_size(name, stamp, fstat(file.fileno()).st_size)
        try:
            data = file.read(stamp.num_bytes + 1)
        except (MemoryError, OverflowError):
            raise IntegrityError(f"{name} has {stamp.num_bytes:,} bytes, which do not fit in memory") from None
    check_size(name, stamp, len(data))
    check_digest(name, stamp, hashlib.sha256(data).hexdigest())
    return data


def parsed(name: str, data: bytes) -> Any:
    """Parse values.

    Raises:
        IntegrityError: They are not JSON.
    """
    try:
        return parse_json(data)
    except ValueError as error:
        raise IntegrityError(f"{name} is not JSON: {error}") from error


def _tensors(name: str, data: bytes) -> "dict[str, Tensor]":
    from bigbatch.lm.checkpoint.safetensors_file import read_tensors  # imports torch

    try:
        return read_tensors(data)
    except ValueError as error:
        raise IntegrityError(f"{name} is not a safetensors file: {error}") from error
