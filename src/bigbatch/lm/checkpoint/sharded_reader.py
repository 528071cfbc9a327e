"""Fill tensors from a checkpoint, each rank its own shards; the number of ranks may differ from the writing run.

manifest → every file hashed by one rank → vote → headers: the tensors of each file → vote → slices → tensors

The planner of `torch.distributed.checkpoint` maps slices of the stored shards to slices of the tensors.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import file_digest, sha256
from os import fstat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from bigbatch.distributed.collective import RankGroup, rank_group, run_together
from bigbatch.errors import CheckpointError, os_reason
from bigbatch.lm.checkpoint.catalog import numbered
from bigbatch.lm.checkpoint.integrity import (
    IntegrityError,
    NewerCheckpointError,
    check_digest,
    check_size,
    opened,
    verified_manifest,
)
from bigbatch.lm.checkpoint.manifest import Manifest
from bigbatch.lm.checkpoint.reader import Contents, checked_bytes, parsed
from bigbatch.lm.checkpoint.safetensors_file import NAMES
from bigbatch.lm.checkpoint.sharded_writer import CHECKPOINT_ERRORS, check_shards
from bigbatch.lm.checkpoint.shards import ShardInfo, check_cover, from_header, part_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DTYPES = {name: dtype for dtype, name in NAMES.items()}


def newest_together(
    folder: Path, group: "ProcessGroup | None" = None, *, below: int | None = None
) -> tuple[Path | None, Manifest | None, list[tuple[Path, str]]]:
    """Find the newest valid checkpoint; each file is hashed by one rank. Collective.

    Args:
        folder: The checkpoints, the same on all ranks.
        group: All ranks that will hold a shard; None for all of the process group.
        below: Only checkpoints of earlier steps; None for all.

    Returns:
        Its folder and its manifest, or None and None; then the invalid newer ones with reasons, newest first.

    Raises:
        CheckpointError: The folder cannot be listed.
        ValueError: The ranks find different checkpoints in it.
        NewerCheckpointError: A newer bigbatch wrote the newest valid one.
    """
    ranks = rank_group(group)
    together = partial(run_together, ranks, errors=CHECKPOINT_ERRORS)
    try:
        check = partial(_check_same_names, folder)
        names = together(lambda: [path.name for path in numbered(folder, below=below)], check, str)
        rejected: list[tuple[Path, str]] = []
        for path in (folder / name for name in reversed(names)):
            loading = _ShardedRead(path, {}, ranks)
            try:
                together(loading.verify, loading.agree, loading.failure_message)
            except NewerCheckpointError as reason:
                raise NewerCheckpointError(f"{path.name}: {reason}") from None
            except IntegrityError as reason:
                rejected.append((path, str(reason)))
            else:
                return path, loading.manifest, rejected
    except ConnectionError as error:
        raise CheckpointError(f"the checkpoints in {folder} cannot be verified: {error}.") from error
    return None, None, rejected


def _check_same_names(folder: Path, names: list[list[str]]) -> list[list[str]]:
    for rank, found in enumerate(names):
        if found[-1:] != names[0][-1:]:
            own, other = (" ".join(newest[-1:]) for newest in (names[0], found))
            raise ValueError(
                f"rank {rank} finds {other or 'no checkpoint'} in {folder.parent}, and rank 0 {own or 'none'}: the run "
                "directory has to be one folder that all machines see, with one content."
            )
    return [names[0]] * len(names)


def read_into(
    path: Path, tensors: Mapping[str, Tensor], group: "ProcessGroup | None" = None, *, manifest: Manifest | None = None
) -> Contents:
    """Fill tensors in place, every rank its own shards. Collective.

        contents = read_into(path, tensors)
        contents.values == the values of the checkpoint
        tensors[name] == the stored tensor of that name, sharded like tensors[name]

    Accepts checkpoints of any number of ranks, and those of `bigbatch.lm.checkpoint.write`. No rank reads more of a
    tensor than its shard, except to hash files, each of which one rank hashes. A file that changes between its
    verification and its reading is not detected, unlike in `bigbatch.lm.checkpoint.read`. Six messages per rank, four
    with a manifest; none contains a tensor.

    Args:
        path: The folder ``…/step-N``, the same on all ranks.
        tensors: The tensors to fill, by their name in the checkpoint: DTensors, and plain tensors, which every rank
            fills whole. Floating-point tensors may have another dtype than the stored ones.
        group: All ranks that hold a shard; None for all ranks.
        manifest: As `newest_together` returned it for this folder; the files are not hashed again then.

    Returns:
        The contents of the checkpoint on every rank, with the filled tensors only.

    Raises:
        CheckpointError: It is invalid; the message names the file and the reason. No tensor was changed, unless a file
            became unreadable after its verification.
        TypeError, ValueError: A tensor is missing in it, or has another shape or kind of dtype. No tensor was changed.
    """
    ranks = rank_group(group)
    together = partial(run_together, ranks, errors=CHECKPOINT_ERRORS)
    loading = _ShardedRead(path, tensors, ranks, manifest)
    try:
        if manifest is None:
            together(loading.verify, loading.agree, loading.failure_message)
        together(loading.plan, list, loading.failure_message)
        together(loading.fill, list, loading.failure_message)
    except (IntegrityError, ConnectionError) as error:
        raise CheckpointError(loading.failure_message(str(error))) from error
    return loading.contents()


@dataclass(frozen=True)
class _StoredShard:
    """A shard of a tensor, as the header of its file describes it."""

    part: str
    file: str
    place: ShardInfo
    sizes: tuple[int, ...]
    dtype: torch.dtype


class _ShardedRead:
    """The state of one read on one rank."""

    def __init__(
        self, path: Path, tensors: Mapping[str, Tensor], ranks: RankGroup, manifest: Manifest | None = None
    ) -> None:
        self._path, self._tensors, self._ranks = path, dict(tensors), ranks
        self.manifest: Manifest
        if manifest is not None:
            self.manifest = manifest
        self._values: dict[str, Any] = {}
        self._parts: dict[str, str] = {}
        self._items: dict[str, list[ReadItem]] = {}
        self._planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)

    def verify(self) -> str:
        """Verify this rank's share of the files, and return the SHA-256 of the manifest."""
        self.manifest = verified_manifest(self._path)
        for name in self._share():
            stamp = self.manifest.files[name]
            with opened(self._path, name) as file:
                check_size(name, stamp, fstat(file.fileno()).st_size)
                check_digest(name, stamp, file_digest(file, "sha256").hexdigest())
        return sha256(self.manifest.to_bytes()).hexdigest()

    def _share(self) -> list[str]:
        """Assign files to ranks, largest first, each to the rank with the fewest bytes so far."""
        loads, own = [0] * self._ranks.size, []
        for name, stamp in sorted(self.manifest.files.items(), key=lambda item: (-item[1].num_bytes, item[0])):
            rank = loads.index(min(loads))
            loads[rank] += stamp.num_bytes
            if rank == self._ranks.rank:
                own.append(name)
        return own

    def agree(self, digests: list[str]) -> list[None]:
        """Check that all ranks have read the same manifest. First rank."""
        if len(set(digests)) > 1:
            raise IntegrityError("manifest.json is not the same on all ranks")
        return [None] * len(digests)

    def plan(self) -> None:
        """Read the values and the headers, and plan the slices that this rank reads; fills nothing."""
        check_shards("the tensors to fill", self._tensors)
        held: dict[str, list[_StoredShard]] = defaultdict(list)
        for name, stamp in self.manifest.files.items():
            if name.endswith(".json"):
                self._values[name.removesuffix(".json")] = parsed(name, checked_bytes(self._path, name, stamp))
            else:
                for held_name, piece in _stored_shards(self._path, name):
                    held[held_name].append(piece)
        for name, tensor in self._tensors.items():
            self._check(name, tensor, held.get(name, []))
        metadata = _metadata({name: held[name] for name in self._tensors})
        self._parts = {name: held[name][0].part for name in self._tensors}
        self._planner.set_up_planner(self._tensors, metadata, is_coordinator=self._ranks.rank == 0)
        for item in self._planner.finish_plan(self._planner.create_local_plan()).items:
            self._items.setdefault(metadata.storage_data[item.storage_index], []).append(item)

    def _check(self, name: str, tensor: Tensor, pieces: list[_StoredShard]) -> None:
        if not pieces:
            raise ValueError(f"checkpoint {self._path.name} has no tensor called {name}: it is of another model.")
        if len({piece.part for piece in pieces}) > 1:
            raise IntegrityError(f"{name} is in two parts of it")
        check_cover(name, [(piece.place, piece.sizes) for piece in pieces])
        if pieces[0].place.shape != tuple(tensor.shape):
            raise ValueError(
                f"{name} has the shape {list(pieces[0].place.shape)} in checkpoint {self._path.name}, not "
                f"{list(tensor.shape)}."
            )
        dtypes = {piece.dtype for piece in pieces}
        if len(dtypes) > 1:
            raise IntegrityError(f"{name} has pieces of several dtypes")
        if (dtype := dtypes.pop()) != tensor.dtype and not (dtype.is_floating_point and tensor.is_floating_point()):
            raise ValueError(f"{name} is {dtype} in checkpoint {self._path.name}, not {tensor.dtype}.")

    def fill(self) -> None:
        """Copy the slices."""
        for name, items in self._items.items():
            with _header(self._path, name) as file:
                for item in items:
                    lengths = zip(item.storage_offsets, item.lengths, strict=True)
                    slices = tuple(slice(start, start + length) for start, length in lengths)
                    piece = file.get_slice(item.storage_index.fqn)[slices]
                    self._planner.resolve_tensor(item).detach().copy_(piece)

    def contents(self) -> Contents:
        """Return the contents of the checkpoint."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, part in self._parts.items():
            tensors.setdefault(part, {})[name] = self._tensors[name]
        return Contents(self.manifest.step, self.manifest.run_id, self.manifest.files, tensors, self._values)

    def failure_message(self, reason: str) -> str:
        """Return the message of an error."""
        return f"checkpoint {self._path} cannot be used: {reason}."


@contextmanager
def _header(path: Path, name: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path / name, framework="pt") as file:
            yield file
    except (SafetensorError, KeyError) as error:
        raise IntegrityError(f"{name} is not a safetensors file: {error}") from error
    except OSError as error:
        raise IntegrityError(f"{name} cannot be read: {os_reason(error)}") from error


def _stored_shards(path: Path, name: str) -> Iterator[tuple[str, _StoredShard]]:
    with _header(path, name) as file:
        tensors = {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118, not a mapping
        places = from_header(name, file.metadata(), tensors)
        part = name.removesuffix(".safetensors") if places is None else part_of(name)
        for tensor, view in tensors.items():
            sizes = tuple(view.get_shape())
            place = ShardInfo(sizes, (0,) * len(sizes)) if places is None else places[tensor]
            yield tensor, _StoredShard(part, name, place, sizes, _DTYPES[view.get_dtype()])


def _metadata(held: Mapping[str, list[_StoredShard]]) -> Metadata:
    """Describe shards in the classes of DCP, without those that have no elements."""
    tensors: dict[str, Any] = {}
    files: dict[MetadataIndex, str] = {}
    for name, pieces in held.items():
        chunks = []
        for piece in pieces:
            if 0 not in piece.sizes:
                offsets = torch.Size(piece.place.saved_offsets)
                chunks.append(ChunkStorageMetadata(offsets, torch.Size(piece.sizes)))
                files[MetadataIndex(name, offsets)] = piece.file
        size = torch.Size(pieces[0].place.shape)
        tensors[name] = TensorStorageMetadata(TensorProperties(pieces[0].dtype), size, chunks)
    return Metadata(tensors, storage_data=files)
