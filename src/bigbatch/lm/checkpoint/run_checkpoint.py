"""Load runs: the newest checkpoint that is intact, of this run, complete, and whose lines of metrics exist.

checkpoints → manifest and SHA-256 → run id → seal → types of every field → lines of metrics → engine, progress
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bigbatch.accumulation.optimizer_state import init_optimizer_state
from bigbatch.engine.engine import Engine
from bigbatch.errors import CheckpointError, InputError, os_reason
from bigbatch.lm.checkpoint import newest, read
from bigbatch.lm.checkpoint.catalog import step_of
from bigbatch.lm.checkpoint.integrity import IntegrityError, NewerCheckpointError
from bigbatch.lm.checkpoint.manifest import Manifest
from bigbatch.lm.checkpoint.progress import Progress as Progress
from bigbatch.lm.checkpoint.saved_state import STATE, check_seal, check_types, validate
from bigbatch.lm.checkpoint.sharded_reader import newest_together, read_into
from bigbatch.lm.checkpoint.state_tree import join_tensors, split_tensors
from bigbatch.lm.config.field_types import CheckpointingMode
from bigbatch.lm.distributed.ranks import SINGLE_PROCESS, RankContext
from bigbatch.lm.files import open_regular
from bigbatch.lm.runs.directory import size_of_lines
from bigbatch.lm.runs.file_names import CHECKPOINTS, CONFIG, METRICS, QUARANTINE
from bigbatch.lm.runs.identity import LEGACY_LAYOUT, RunIdentity, read_identity
from bigbatch.rng import seed_of, states_of_seed

FILES = {"/engine/model/": "model", "/engine/optimizer/": "optimizer"}  # the other tensors are random states
OTHERS = "random"
OLD_NAMES = {"owed": "pending_metrics_row"}  # in checkpoints of bigbatch 0.1.0


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

    def check_model(self, engine: Engine) -> None:
        """Check that the model of an engine has the tensors of this checkpoint; reads none.

        Raises:
            InputError: It has others.
        """
        own, saved = engine.state_dict()["model"].keys(), self.engine["model"].keys()
        for some, lacking, having in ((own - saved, "the state", "this model"), (saved - own, "it", "the state")):
            if some:
                raise InputError(
                    f"{self.path} is not of this model: {lacking} lacks {len(some)} tensors of {having}, such as "
                    f"{min(some)}. Restore the original model."
                )

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
            ValueError: It is the state of another model or optimizer, or a value has another type.
            CheckpointError: A file of the checkpoint can no longer be read.
        """
        state = self.engine_of(ranks, [device])
        own_state = engine.state_dict()
        for part in ("optimizer", "scheduler", "scaler"):
            check_types(f"engine.{part}", own_state[part], state[part])
        if self.manifest is None:
            engine.load_state_dict(state)
            return
        _, saved = split_tensors({"engine": state})
        own = own_state["model"]
        model = {name: own.get(name, tensor) for name, tensor in state["model"].items()}
        engine.load_state_dict({**state, "model": model, "optimizer": {**state["optimizer"], "state": {}}})
        init_optimizer_state(optimizer)
        _, tensors = split_tensors({"engine": engine.state_dict()})
        to_fill = {place: t for place, t in tensors.items() if place in saved and place.startswith(tuple(FILES))}
        read_into(self.path, to_fill, manifest=self.manifest)


def load(
    directory: Path, ranks: RankContext = SINGLE_PROCESS
) -> tuple[RunCheckpoint | None, tuple[tuple[Path, str], ...]]:
    """Find the newest checkpoint that the run can resume from; return it with the newer ones that it cannot, and why.

    It is valid, of this run, with a complete state, and metrics.jsonl and quarantine.jsonl hold its lines. Collective
    if the ranks shard the model: each hashes its share of the files and reads no tensor of the model or of the
    optimizer until `RunCheckpoint.restore`.

    Raises:
        InputError: A checkpoint is of another run or of a newer bigbatch; or the lines of every one are missing; or
            ranks that shard the model find different checkpoints.
        CheckpointError: The folder of the checkpoints is a link or cannot be listed.
    """
    identity = read_identity(directory)
    rejected: list[tuple[Path, str]] = []
    below: int | None = None
    lines_are_missing = False
    while True:
        path, manifest, invalid = _newest(directory, ranks, below)
        rejected += invalid
        if path is None:
            break
        try:
            checkpoint = _read(directory, path, manifest, identity)
        except MissingLinesError as reason:
            lines_are_missing = True
            rejected.append((path, str(reason)))
        except IntegrityError as reason:
            rejected.append((path, str(reason)))
        else:
            return replace(checkpoint, rejected=tuple(rejected)), tuple(rejected)
        below = step_of(path)
    if lines_are_missing:
        path, reason_of_newest = rejected[0]
        raise InputError(
            f"{directory} has no checkpoint whose lines of metrics are complete ({path.name}: {reason_of_newest}). "
            f"Restore {directory / METRICS}."
        )
    return None, tuple(rejected)


class MissingLinesError(IntegrityError):
    """A checkpoint that counts more lines of metrics than the run directory holds."""


def _newest(
    directory: Path, ranks: RankContext, below: int | None
) -> tuple[Path | None, Manifest | None, list[tuple[Path, str]]]:
    try:
        if ranks.are_sharded:
            return newest_together(directory / CHECKPOINTS, below=below)
        path, rejected = newest(directory / CHECKPOINTS, below=below)
    except NewerCheckpointError as reason:
        raise InputError(
            f"{directory} has a checkpoint of a newer bigbatch ({reason}). Upgrade bigbatch; nothing was changed."
        ) from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error
    return path, None, rejected


def _read(directory: Path, path: Path, manifest: Manifest | None, identity: RunIdentity) -> RunCheckpoint:
    """Read and validate a checkpoint whose files are intact.

    Raises:
        InputError: It is of another run.
        IntegrityError: Its state cannot be used.
    """
    try:
        contents = read(path) if manifest is None else read(path, parts=(OTHERS,))
    except CheckpointError as error:
        raise IntegrityError(str(error.__cause__ or error)) from error
    if contents.run_id != identity.run_id:
        raise InputError(_of_another_run(directory, path, contents.run_id, identity))
    tensors = {place: tensor for file in contents.tensors.values() for place, tensor in file.items()}
    if manifest is not None:
        tensors = defaultdict(lambda: torch.empty(0, device="meta"), tensors)
    stamps = {name: stamp for name, stamp in contents.stamps.items() if not name.endswith(".json")}
    values = check_seal(contents.values.get("state"), stamps, required=identity.layout > LEGACY_LAYOUT)
    try:
        state = join_tensors(values, tensors)
        state["progress"] = {OLD_NAMES.get(name, name): value for name, value in state["progress"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise IntegrityError(f"{STATE} is not the state of a run") from None
    validate(state)
    progress = Progress(**state["progress"])
    if progress.step != contents.step:
        raise IntegrityError(f"{STATE} is of update {progress.step:,}, and the checkpoint of {contents.step:,}")
    _check_lines(directory, progress)
    return RunCheckpoint(
        progress,
        state["engine"],
        tuple(state.get("ranks", ())),
        state["level"],
        state["total_steps"],
        state["facts"],
        path,
        (),
        manifest,
    )


def _of_another_run(directory: Path, path: Path, run_id: str, identity: RunIdentity) -> str:
    if identity.layout == LEGACY_LAYOUT:  # where the id is a hash of config.json
        return (
            f"{path} was saved with another {CONFIG} than the one in {directory}. Restore {CONFIG}, or move the "
            "checkpoint away if it was copied from another run."
        )
    return (
        f"{path} belongs to run {run_id}, and {directory} is run {identity.run_id}. Move the checkpoint away to resume "
        "without it."
    )


def _check_lines(directory: Path, progress: Progress) -> None:
    """Check that the files of lines hold those that a checkpoint counts, and that the last one ends there.

    Raises:
        MissingLinesError: They do not.
        InputError: A file is a link or no regular file.
    """
    for name, num_bytes in ((METRICS, progress.lines_before_pending), (QUARANTINE, progress.quarantine_bytes)):
        path = directory / name
        found_bytes = size_of_lines(path)
        if found_bytes < num_bytes:
            raise MissingLinesError(f"{name} has {found_bytes:,} bytes and had {num_bytes:,} when it was saved")
        if num_bytes > 0 and not _ends_a_line(path, num_bytes):
            raise MissingLinesError(f"no line of {name} ends at byte {num_bytes:,}, as one did when it was saved")


def _ends_a_line(path: Path, num_bytes: int) -> bool:
    try:
        with open_regular(path) as file:
            file.seek(num_bytes - 1)
            return file.read(1) == b"\n"
    except OSError as error:
        raise InputError(f"{path} cannot be read: {os_reason(error)}.") from error
