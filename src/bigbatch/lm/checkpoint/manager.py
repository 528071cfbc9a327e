"""When a run is saved, and how it goes on: its state between two updates, in checkpoints that are whole or not there.

engine, progress → state → a checkpoint beside the training → the newest that verifies → engine, progress
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
from bigbatch.lm.checkpoint.state_tree import bits, copy_to_cpu, join_tensors, split_tensors
from bigbatch.lm.config.field_types import CheckpointingMode
from bigbatch.lm.distributed.ranks import SINGLE_PROCESS, RankContext
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.runs.file_names import CHECKPOINTS, CONFIG
from bigbatch.rng import seed_of, states_of_seed

FILES = {"/engine/model/": "model", "/engine/optimizer/": "optimizer"}  # tensors of the rest are random states
OTHERS = "random"
OLD_NAMES = {"owed": "pending_metrics_row"}  # in checkpoints of bigbatch 0.1.0
BY_RANK = ("random", "engine")  # of an engine's state; the rest is the same on every rank


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: Updates done, the skipped ones included: each had its batch.
        cursor: Samples taken since the beginning of the first pass: the place in the data, which is all that its order
            depends on besides the seed.
        skipped: Updates that changed nothing.
        skipped_in_a_row: The last of them without one that did between them.
        validation_loss: The last one, in nats per token, or None.
        metrics_bytes: Of metrics.jsonl at this point.
        quarantine_bytes: Of quarantine.jsonl.
        batch: Sequences of the last window as its schedule had it; 0 without one.
        pending_metrics_row: The last line of metrics.jsonl, where the run was stopped before what comes after that
            update: it is written again with the validation loss; None otherwise.
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
    """What a checkpoint held.

    Attributes:
        progress: How far the run had come.
        engine: As `bigbatch.Engine.load_state_dict` takes it, of the first rank.
        ranks: What of it differs by rank, of each: random states, and the micro-batch in use. Empty of a single one.
        checkpointing_mode: What was computed anew in backward.
        total_steps: Updates of the whole run.
        facts: What the run was made of: see `bigbatch.lm.training.resume`.
        path: The checkpoint.
        rejected: Newer ones that cannot be trusted, with the reason.
        manifest: Of a checkpoint of which each rank will read its shards: the tensors of model and optimizer in
            ``engine`` are empty then. None where they were read.
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
        """Give the state of the engine on this rank; on another number of ranks, the others draw new random numbers."""
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
    """Saves a run every so many updates; a context, which ends when the last checkpoint is written.

        with Keeper(directory, keep=2, beside=False, total_steps=300, facts=facts).open() as keeper:
            keeper.save(engine, progress, level)

    Args:
        directory: The run's.
        keep: Checkpoints that are kept.
        in_background: Whether to write beside the training, from a copy on the host; not of shards, which all ranks
            write.
        total_steps: Updates of the whole run.
        facts: What the run is made of, for whoever goes on with it.
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
        self._beside = in_background
        self._total_steps = total_steps
        self._facts = facts
        self._pool: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    @contextmanager
    def open(self) -> Iterator["CheckpointManager"]:
        """Wait, in the end, for what is being written.

        Raises:
            CheckpointError: It could not be written.
        """
        self._pool = ThreadPoolExecutor(1, "checkpoint") if self._beside else None
        try:
            yield self
            self._wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def save(self, engine: Engine, progress: Progress, checkpointing_mode: str) -> None:
        """Save the run as it is between two updates; the lines of its files up to here are on the disk before.

        Collective: every rank brings what is its own.

        Raises:
            CheckpointError: This one or the one before could not be written.
        """
        self._wait()
        progress.metrics_bytes, progress.quarantine_bytes = self._directory.sync()
        whole = engine.state_dict()
        own = {name: whole[name] for name in BY_RANK}
        of_ranks = [] if self._ranks.size == 1 else self._ranks.all_gather(copy_to_cpu(own))
        state = {
            "engine": whole,
            "ranks": of_ranks,
            "progress": asdict(progress),
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
        together = write_sharded if self._ranks.are_sharded else write
        together(folder, step, run_id=run_id(self._directory.path), tensors=files, values={"state": values})
        if self._ranks.is_first:
            prune(folder, keep=self._keep)


def load(
    directory: Path, ranks: RankContext = SINGLE_PROCESS
) -> tuple[RunCheckpoint | None, tuple[tuple[Path, str], ...]]:
    """Find the newest checkpoint of a run that verifies; return it with those that were rejected, newest first.

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
    """Tell runs apart by their configuration, which is written before anything else and never again."""
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
