"""Write a checkpoint from several ranks, each its own shards; it is complete or does not exist, on all ranks.

every rank: its shards → first rank: which rank writes which (DCP's planner), step-N.partial/
every rank: its files, hashed and synced → first rank: values, manifest.json → step-N/ → parent synced

The planner of `torch.distributed.checkpoint` assigns each shard to one rank. The files are written here: its writers
return no digest of the bytes they write, and hold a rank's share in memory several times. The messages are sent here
too: its `save` sends pickled exceptions with tracebacks, and raises a BaseException of all of them.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.tensor import DTensor

from bigbatch.distributed.collective import ERRORS, RankGroup, rank_group, run_together
from bigbatch.errors import CheckpointError
from bigbatch.lm.checkpoint.catalog import failure, remove_leftovers
from bigbatch.lm.checkpoint.integrity import IntegrityError, NewerCheckpointError
from bigbatch.lm.checkpoint.manifest import Stamp, file_name
from bigbatch.lm.checkpoint.safetensors_file import check_tensors, write_tensors
from bigbatch.lm.checkpoint.shards import ShardInfo, check_cover, piece_name, to_header
from bigbatch.lm.checkpoint.writer import (
    Values,
    check_names,
    complete,
    is_there,
    value_parts,
    values_after,
    write_file,
)
from bigbatch.lm.files import remove, sync_folder

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Stamps = dict[str, tuple[int, str]]
_Shard = tuple[list[int], list[int], list[int]]  # shape of the whole tensor, offsets and sizes of the shard

CHECKPOINT_ERRORS: tuple[type[Exception], ...] = (NewerCheckpointError, IntegrityError, *ERRORS)


def write_sharded(
    folder: Path,
    step: int,
    *,
    run_id: str,
    tensors: Mapping[str, Mapping[str, Tensor]],
    values: Values,
    group: "ProcessGroup | None" = None,
) -> Path:
    """Write ``folder/step-N``, which is then complete and durable, or does not exist. Collective.

        read(write_sharded(folder, step, run_id=run_id, tensors=tensors, values=values)) returns whole tensors

    The guarantees of `bigbatch.lm.checkpoint.write` hold, with one file for each part and rank, such as
    model-rank-0-of-2.safetensors. Replicas are written once. If a rank cannot write, all ranks raise the same message.
    Four messages per rank; no rank waits for one that failed, and the launcher must end the others if one is killed.

    Args:
        folder: The folder of the checkpoints, the same on all ranks, on a shared file system.
        step: Number of updates done.
        run_id: Identifier of the run; a checkpoint of another run is not overwritten.
        tensors: ``tensors["model"][name]``: DTensors, of which every rank writes its shards, and plain tensors, which
            the first rank writes. No name is in two parts.
        values: As for `bigbatch.lm.checkpoint.write`; the first rank writes them.
        group: All ranks that hold a shard; None for all ranks.

    Returns:
        The folder of the checkpoint, on every rank.

    Raises:
        TypeError, ValueError: A value would not survive a round trip; nothing was written.
        CheckpointError: A rank could not write, or a checkpoint of another run exists. The message names the rank and
            the last valid checkpoint. Partly written files are removed where possible.
    """
    ranks = rank_group(group)
    together = partial(run_together, ranks, errors=CHECKPOINT_ERRORS)
    write = _ShardedWrite(folder, step, run_id, tensors, values, ranks)
    try:
        names = together(write.propose, write.begin, write.failure_message)
        if names is not None:
            together(partial(write.write_own, names), write.finish, write.failure_message)
    except ConnectionError as error:
        raise CheckpointError(write.failure_message(str(error))) from error
    except BaseException:
        write.clear()
        raise
    return write.target


class _ShardedWrite:
    """The state of one write on one rank."""

    def __init__(
        self,
        folder: Path,
        step: int,
        run_id: str,
        tensors: Mapping[str, Mapping[str, Tensor]],
        values: Values,
        ranks: RankGroup,
    ) -> None:
        self.target = folder / f"step-{step}"
        self._folder, self._step, self._run_id = folder, step, run_id
        self._aside = self.target.with_name(f"{self.target.name}.partial")
        self._tensors, self._values, self._ranks = tensors, values, ranks
        self._planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces: dict[str, Tensor] = {}
        self._shards: dict[str, _Shard] = {}

    def propose(self) -> dict[str, _Shard]:
        """Check the tensors and values of this rank, and return the shard that it holds of each tensor."""
        check_names(self._step, self._run_id)
        held: dict[str, Tensor] = {}
        for part, named in self._tensors.items():
            file_name(piece_name(part, self._ranks.rank, self._ranks.size), "safetensors")
            check_shards(part, named)
            for name, tensor in named.items():
                if name in held:
                    raise ValueError(f"{name} is in two parts, of which one is {part}: give each tensor one name.")
                held[name] = tensor
        if self._ranks.rank == 0:
            value_parts(values_after({}, self._values))
        own = {name: t for name, t in held.items() if isinstance(t, DTensor) or self._ranks.rank == 0}
        self._planner.set_up_planner(own, is_coordinator=self._ranks.rank == 0)
        for item in self._planner.create_local_plan().items:
            assert item.tensor_data is not None
            chunk, piece = item.tensor_data.chunk, self._planner.resolve_data(item)
            assert isinstance(piece, Tensor)
            assert piece.shape == chunk.sizes
            name = item.index.fqn
            self._pieces[name] = piece
            self._shards[name] = list(item.tensor_data.size), list(chunk.offsets), list(chunk.sizes)
        return self._shards

    def begin(self, held: list[dict[str, _Shard]]) -> Sequence[list[str] | None]:
        """Assign shards to ranks and create the folder; assign nothing if the checkpoint exists. First rank."""
        assigned = _assign(held)
        remove_leftovers(self._folder)
        if is_there(self.target, self._run_id):
            self._sync()
            return [None] * self._ranks.size
        self._folder.mkdir(exist_ok=True)
        self._aside.mkdir()
        return assigned

    def write_own(self, names: list[str]) -> _Stamps:
        """Write the shards of this rank, one file per part; return the size and SHA-256 of each file."""
        pieces = {name: self._pieces[name] for name in names}
        places = {name: ShardInfo(tuple(shape), tuple(offsets)) for name, (shape, offsets, _) in self._shards.items()}
        stamps: _Stamps = {}
        for part, named in self._tensors.items():
            own = {name: pieces[name] for name in named if name in pieces}
            if not own and self._ranks.rank > 0:
                continue
            file = file_name(piece_name(part, self._ranks.rank, self._ranks.size), "safetensors")
            notes = to_header({name: places[name] for name in own})
            stamp = write_file(self._aside / file, partial(write_tensors, tensors=own, notes=notes))
            stamps[file] = (stamp.num_bytes, stamp.sha256)
        return stamps

    def finish(self, written: list[_Stamps]) -> list[None]:
        """Write the values and the manifest of the files of all ranks, and rename the folder. First rank."""
        stamps = {file: Stamp(*stamp) for own in written for file, stamp in own.items()}
        for file, stamp in stamps.items():
            if not (self._aside / file).is_file() or (self._aside / file).stat().st_size != stamp.num_bytes:
                raise OSError(f"{file} cannot be seen by the first rank: all ranks need one file system")
        parts = value_parts(values_after(stamps, self._values))
        stamps |= {file: write_file(self._aside / file, write_part) for file, write_part in parts.items()}
        complete(self._aside, self.target, stamps, step=self._step, run_id=self._run_id)
        sync_folder(self._folder.parent)
        return [None] * self._ranks.size

    def failure_message(self, reason: str) -> str:
        """Remove the partly written checkpoint and return the message of the error."""
        self.clear()
        return failure(self._folder, self.target, "written to", OSError(reason))

    def clear(self) -> None:
        """Remove the partly written checkpoint, on the first rank only."""
        if self._ranks.rank == 0:
            with suppress(OSError):
                remove(self._aside)

    def _sync(self) -> None:
        sync_folder(self._folder)
        sync_folder(self._folder.parent)


def _assign(held: list[dict[str, _Shard]]) -> list[list[str]]:
    """Assign each distinct shard to one of the ranks that hold it, the one with the fewest elements so far.

    Raises:
        ValueError: The shards of a tensor do not cover it.
    """
    holders: dict[str, dict[tuple[int, ...], list[int]]] = {}
    for rank, shards in enumerate(held):
        for name, (_, offsets, _) in shards.items():
            holders.setdefault(name, {}).setdefault(tuple(offsets), []).append(rank)
    loads = [0] * len(held)
    assigned: list[list[str]] = [[] for _ in held]
    for name, by_offsets in holders.items():
        pieces = []
        for ranks in by_offsets.values():
            rank = min(ranks, key=loads.__getitem__)
            shape, offsets, sizes = held[rank][name]
            loads[rank] += math.prod(sizes)
            assigned[rank].append(name)
            pieces.append((ShardInfo(tuple(shape), tuple(offsets)), tuple(sizes)))
        try:
            check_cover(name, pieces)
        except IntegrityError as error:
            raise ValueError(f"the shards of the ranks do not make whole tensors: {error}.") from error
    return assigned


def check_shards(part: str, tensors: Mapping[str, Tensor]) -> None:
    """Reject tensors whose local shard cannot be stored or filled; reads no tensor.

    Raises:
        TypeError, ValueError: As `bigbatch.lm.checkpoint.safetensors_file.check_tensors` raises them for the local
            shards, or a DTensor is a partial sum.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements):
            raise ValueError(f"{part}: {name} is a partial sum over ranks: redistribute it first.")
    check_tensors(part, {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()})
