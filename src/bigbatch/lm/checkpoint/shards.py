"""Shards of tensors: their offsets in the header of their file, and whole tensors joined from them.

The header is the one that `torch.distributed.checkpoint.HuggingFaceStorageReader` reads, plus the shape of the whole
tensor.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod

import torch
from torch import Tensor

from bigbatch.lm.checkpoint.integrity import IntegrityError

_PLACES = "DCP_SHARDING_INFO"
_FILE = re.compile(r"(.+)-rank-[0-9]+-of-[0-9]+\.safetensors", re.ASCII)


@dataclass(frozen=True)
class ShardInfo:
    """The place of a shard in its tensor.

    Attributes:
        shape: Shape of the whole tensor.
        saved_offsets: Offset of the first element of the shard in each dimension.
    """

    shape: tuple[int, ...]
    saved_offsets: tuple[int, ...]


def piece_name(part: str, rank: int, size: int) -> str:
    """Return the file name of one rank, without its extension: ``model`` → ``model-rank-0-of-2``."""
    return f"{part}-rank-{rank}-of-{size}"


def is_piece(file: str) -> bool:
    """Return whether a file has the name of one rank's shards."""
    return _FILE.fullmatch(file) is not None


def part_of(file: str) -> str:
    """Return the part that a file of one rank belongs to.

    Raises:
        IntegrityError: Its name is not that of a file of one rank.
    """
    if not (match := _FILE.fullmatch(file)):
        raise IntegrityError(f"{file} contains shards, but its name is not that of a file of shards")
    return match[1]


def to_header(places: Mapping[str, ShardInfo]) -> dict[str, str]:
    """Return the metadata in the header of a file of shards."""
    described = {name: asdict(place) for name, place in sorted(places.items())}
    return {"format": "pt", "DCP_VERSION": "1.0", _PLACES: json.dumps(described, ensure_ascii=False)}


def from_header(file: str, notes: Mapping[str, str] | None, names: Iterable[str]) -> dict[str, ShardInfo] | None:
    """Return the places of the tensors of a file, from its metadata; None if they are whole.

    Raises:
        IntegrityError: The metadata cannot be parsed.
    """
    if not notes or _PLACES not in notes:
        return None
    try:
        described = json.loads(notes[_PLACES])
        return {
            name: ShardInfo(_whole(described[name]["shape"]), _whole(described[name]["saved_offsets"]))
            for name in names
        }
    except (ValueError, KeyError, TypeError, RecursionError):
        raise IntegrityError(f"{file} has no valid shard metadata") from None


def _whole(numbers: Sequence[int]) -> tuple[int, ...]:
    if not (isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)):
        raise TypeError
    return tuple(numbers)


def check_cover(name: str, pieces: Sequence[tuple[ShardInfo, Sequence[int]]]) -> None:
    """Check that shards, each with its own shape, cover a tensor exactly once.

    Raises:
        IntegrityError: Elements are missing, covered twice or out of bounds, or the shards are of several tensors.
    """
    shape = pieces[0][0].shape
    boxes = []
    for place, sizes in pieces:
        ends = [start + length for start, length in zip(place.saved_offsets, sizes, strict=False)]
        if (
            place.shape != shape
            or not len(shape) == len(sizes) == len(place.saved_offsets)
            or any(end > length for end, length in zip(ends, shape, strict=True))
        ):
            raise IntegrityError(f"{name} has pieces that do not belong together")
        if prod(sizes):
            boxes.append(list(zip(place.saved_offsets, ends, strict=True)))
    held = sum(prod(sizes) for _, sizes in pieces)
    if held != prod(shape):
        raise IntegrityError(f"{name} has {prod(shape):,} elements, and its pieces hold {held:,}")
    boxes.sort()
    for index, box in enumerate(boxes):
        for other in boxes[index + 1 :]:
            if other and other[0][0] >= box[0][1]:
                break  # and so do all later ones
            if all(start < end for start, end in _shared(box, other)):
                raise IntegrityError(f"{name} has pieces that overlap")


def _shared(box: list[tuple[int, int]], other: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, other, strict=True)]


def join_shards(name: str, pieces: Sequence[tuple[ShardInfo, Tensor]]) -> Tensor:
    """Join a tensor on the CPU.

    Raises:
        IntegrityError: The shards do not cover it exactly once, or have several dtypes.
    """
    check_cover(name, [(place, piece.shape) for place, piece in pieces])
    if len({piece.dtype for _, piece in pieces}) > 1:
        raise IntegrityError(f"{name} has pieces of several dtypes")
    if len(pieces) == 1:
        return pieces[0][1]
    whole = torch.empty(pieces[0][0].shape, dtype=pieces[0][1].dtype)
    for place, piece in pieces:
        own = whole
        for dim, (start, length) in enumerate(zip(place.saved_offsets, piece.shape, strict=True)):
            own = own.narrow(dim, start, length)
        own.copy_(piece)
    return whole
