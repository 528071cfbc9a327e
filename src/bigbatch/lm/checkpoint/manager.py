"""Save and restore runs: their state between two updates, in checkpoints that are complete or do not exist.

engine, progress → state → a checkpoint, in the background → the newest valid one → engine, progress
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigbatch.accumulation.optimizer_state import init_optimizer_state
from bigbatch.engine.engine import Engine
from bigbatch.errors import InputError
from bigbatch.lm.checkpoint import newest, prune, read, write
from bigbatch.lm.checkpoint.manifest import Manifest
from bigbatch.lm.checkpoint.sharded_reader import newest_together, read_into
from bigbatch.lm.checkpoint.sharded_writer import write_sharded
from bigbatch.lm.checkpoint.state_tree import bits, copy_to_cpu, from_message, join_tensors, split_tensors, to_message
from bigbatch.lm.config.field_types import CheckpointingMode
from bigbatch.lm.distributed.ranks import SINGLE_PROCESS, RankContext
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.runs.file_names import CHECKPOINTS, CONFIG
from bigbatch.rng import seed_of, states_of_seed

FILES = {"/engine/model/": "model", "/engine/optimizer/": "optimizer"}  # the other tensors are random states
OTHERS = "random"
OLD_NAMES = {"owed": "pending_metrics_row"}  # in checkpoints of bigbatch 0.1.0
BY_RANK = ("random", "engine")  # parts of the engine's state that differ by rank


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        step: Number of updates done, including skipped ones.
        cursor: Number of samples used since the start of the first pass. With the seed, it determines the next samples.
        skipped: Number of skipped updates.
        skipped_in_a_row: Number of skipped updates since the last one that was applied.
        validation_loss: Last validation loss, in nats per token, or None.
        metrics_bytes: Size of metrics.jsonl.
        quarantine_bytes: Size of quarantine.jsonl.
        batch: Sequences in the last window according to the batch schedule; 0 without a schedule.
        pending_metrics_row: Last line of metrics.jsonl if the run was stopped before validating that update; it is
            written again with the validation loss. None otherwise.
    """

    step: int = 0
    cursor: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    validation_loss: float | None = None
    metrics_bytes: int = 0
    quarantine_bytes: int = 0
    batch: int = 0
    pending_metrics_row: dict[str, Any] | None = None


@dataclass(frozen=True)
class RunCheckpoint:
    """The contents of a checkpoint.

    Attributes:
        progress: Progress of the run.
        engine: State of the engine on the first rank, for `bigbatch.Engine.load_state_dict`.
        ranks: The parts of it that differ by rank, for each rank: random states and the micro-batch in use. Empty for
            a single rank.
        checkpointing_mode: Activation checkpointing in use.
        total_steps: Number of updates of the whole run.
        facts: Fingerprints of data, vocabulary and weights; see `bigbatch.lm.training.resume`.
        path: Folder of the checkpoint.
        rejected: Newer invalid checkpoints, with the reason.
        manifest: Manifest of a checkpoint of which each rank will read its own shards; the tensors of model and
            optimizer in ``engine`` are empty then. None if they have been read.
    """

    progress: Progress
    engine: Mapping[str, Any]
    ranks: tuple[Mapping[str, Any], ...]
    checkpointing_mode: CheckpointingMode
    total_steps: int
    facts: Mapping[str, Any]
    path: Path
    rejected: tuple[tuple[Path, str], ...]
    manifest: Manifest | None = None

    def engine_of(self, ranks: RankContext, devices: Sequence[torch.device]) -> Mapping[str, Any]:
        """Return the engine's state on this rank; on a new number of ranks, all but the first get new seeds."""
        of_ranks = self.ranks or ({},)
        if len(of_ranks) == ranks.size:
            return {**self.engine, **of_ranks[ranks.rank]}
        if ranks.is_first:
            return self.engine
        seed = seed_of(self.facts["settings"]["seed"], ranks.rank, self.progress.step)
        return {**self.engine, "random": states_of_seed(seed, devices)}

    def restore(
        self, engine: Engine, optimizer: torch.optim.Optimizer, ranks: RankContext, device: torch.device
    ) -> None:
        """Load the state of the engine on this rank. Collective if each rank reads its shards.

        Shards are read in place, so that no tensor of the model or of the optimizer is in memory twice.

        Args:
            engine: Of the run.
            optimizer: Of the engine.
            ranks: The processes of the run.
            device: Of this rank.

        Raises:
            ValueError: It is the state of another model or optimizer.
            CheckpointError: A file of the checkpoint can no longer be read.
        """
        state = self.engine_of(ranks, [device])
        if self.manifest is None:
            engine.load_state_dict(state)
            return
        _, saved = split_tensors({"engine": state})
        own = engine.state_dict()["model"]
        model = {name: own.get(name, tensor) for name, tensor in state["model"].items()}
        engine.load_state_dict({**state, "model": model, "optimizer": {**state["optimizer"], "state": {}}})
        init_optimizer_state(optimizer)
        _, tensors = split_tensors({"engine": engine.state_dict()})
        to_fill = {place: t for place, t in tensors.items() if place in saved and place.startswith(tuple(FILES))}
        read_into(self.path, to_fill, manifest=self.manifest)


class CheckpointManager:
    """Writes the checkpoints of a run, in the background if asked to.

        with CheckpointManager(directory, keep=2, in_background=False, total_steps=300, facts=facts).open() as manager:
            manager.save(engine, progress, checkpointing_mode)

    Args:
        directory: The run directory.
        keep: Number of checkpoints to keep.
        in_background: Whether to write during training, from a copy on the host; not supported for shards, which all
            ranks write.
        total_steps: Number of updates of the whole run.
        facts: Fingerprints of data, vocabulary and weights, which resuming compares.
        ranks: The processes of the run; the first writes.
    """

    def __init__(
        self,
        directory: RunDirectory,
        *,
        keep: int,
        in_background: bool,
        total_steps: int,
        facts: Mapping[str, Any],
        ranks: RankContext = SINGLE_PROCESS,
    ) -> None:
        self._ranks = ranks
        self._directory = directory
        self._keep = keep
        self._in_background = in_background
        self._total_steps = total_steps
        self._facts = facts
        self._pool: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    @contextmanager
    def open(self) -> Iterator["CheckpointManager"]:
        """Wait at the end of the block for the checkpoint that is being written.

        Raises:
            CheckpointError: It could not be written.
        """
        self._pool = ThreadPoolExecutor(1, "checkpoint") if self._in_background else None
        try:
            yield self
            self._wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def save(self, engine: Engine, progress: Progress, checkpointing_mode: str) -> None:
        """Save the run between two updates, after syncing the lines written to its files so far. Collective.

        Raises:
            CheckpointError: This checkpoint or the previous one could not be written.
        """
        self._wait()
        metrics_bytes, quarantine_bytes = self._directory.sync()
        whole = engine.state_dict()
        own = {name: whole[name] for name in BY_RANK}
        of_ranks = (
            [] if self._ranks.size == 1 else [from_message(each) for each in self._ranks.all_gather(to_message(own))]
        )
        state = {
            "engine": whole,
            "ranks": of_ranks,
            "progress": asdict(progress) | {"metrics_bytes": metrics_bytes, "quarantine_bytes": quarantine_bytes},
            "level": checkpointing_mode,
            "total_steps": self._total_steps,
            "facts": dict(self._facts),
        }
        if self._ranks.are_sharded:
            self._write(progress.step, state)
            return
        if not self._ranks.is_first:
            return
        if self._pool is None:
            self._write(progress.step, state)
        else:
            self._writing = self._pool.submit(self._write, progress.step, copy_to_cpu(state))

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, state: dict[str, Any]) -> None:
        values, tensors = split_tensors(state)
        files: dict[str, dict[str, Any]] = {}
        for place, tensor in tensors.items():
            file = next((file for prefix, file in FILES.items() if place.startswith(prefix)), OTHERS)
            files.setdefault(file, {})[place] = tensor
        folder = self._directory.checkpoints
        write_files = write_sharded if self._ranks.are_sharded else write
        write_files(folder, step, run_id=run_id(self._directory.path), tensors=files, values={"state": values})
        if self._ranks.is_first:
            prune(folder, keep=self._keep)


def load(
    directory: Path, ranks: RankContext = SINGLE_PROCESS
) -> tuple[RunCheckpoint | None, tuple[tuple[Path, str], ...]]:
    """Find the newest valid checkpoint of a run; return it with the invalid ones, newest first.

    Collective if the ranks shard the model: each hashes its share of the files and reads no tensor of the model or of
    the optimizer until `RunCheckpoint.restore`.

    Raises:
        InputError: Ranks that shard the model find different checkpoints.
    """
    manifest: Manifest | None = None
    if ranks.are_sharded:
        try:
            path, manifest, rejected = newest_together(directory / CHECKPOINTS)
        except ValueError as error:
            raise InputError(str(error)) from error
    else:
        path, rejected = newest(directory / CHECKPOINTS)
    if path is None:
        return None, tuple(rejected)
    contents = read(path) if manifest is None else read(path, parts=(OTHERS,))
    tensors = {place: tensor for file in contents.tensors.values() for place, tensor in file.items()}
    if manifest is not None:
        tensors = defaultdict(lambda: torch.empty(0, device="meta"), tensors)
    state = join_tensors(contents.values["state"], tensors)
    progress = Progress(**{OLD_NAMES.get(name, name): value for name, value in state["progress"].items()})
    checkpoint = RunCheckpoint(
        progress,
        state["engine"],
        tuple(state.get("ranks", ())),
        state["level"],
        state["total_steps"],
        state["facts"],
        path,
        tuple(rejected),
        manifest,
    )
    return checkpoint, checkpoint.rejected


def run_id(folder: Path) -> str:
    """Return an identifier of a run: a hash of its configuration, which is written once, before anything else."""
    return sha256((folder / CONFIG).read_bytes()).hexdigest()[:16]


def frozen_fingerprint(model: nn.Module) -> str | None:
    """Return the SHA-256, in hex, of the parameters that are not trained, which checkpoints leave out; None without.

    Collective if the model is sharded; it is the same then as of the whole model. One tensor is gathered at a time.
    """
    from torch.distributed.tensor import DTensor

    frozen = [(name, p) for name, p in sorted(model.named_parameters()) if not p.requires_grad]
    if not frozen:
        return None
    digest = sha256()
    for name, parameter in frozen:
        digest.update(name.encode())
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        digest.update(bits(whole).numpy().tobytes())
    return digest.hexdigest()
