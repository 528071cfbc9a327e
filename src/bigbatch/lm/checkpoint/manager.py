"""Save runs: their state between two updates, in checkpoints that are complete or do not exist.

engine, progress → state → a checkpoint, in the background → the newest ones are kept
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from bigbatch.engine.engine import Engine
from bigbatch.lm.checkpoint import prune, write
from bigbatch.lm.checkpoint.catalog import set_aside
from bigbatch.lm.checkpoint.manifest import Stamp
from bigbatch.lm.checkpoint.run_checkpoint import FILES, OTHERS, Progress
from bigbatch.lm.checkpoint.saved_state import sealed
from bigbatch.lm.checkpoint.sharded_writer import write_sharded
from bigbatch.lm.checkpoint.state_tree import bits, copy_to_cpu, from_message, split_tensors, to_message
from bigbatch.lm.distributed.ranks import SINGLE_PROCESS, RankContext
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.runs.identity import read_identity

BY_RANK = ("random", "engine")  # parts of the engine's state that differ by rank


class CheckpointManager:
    """Writes the checkpoints of a run, in the background if asked to.

        with CheckpointManager(directory, keep=2, in_background=False, total_steps=300, facts=facts).open() as manager:
            manager.save(engine, progress, checkpointing_mode)

    Args:
        directory: The run directory.
        keep: Number of checkpoints to keep; ``"best"`` for that of the best validation and the newest other one.
        in_background: Whether to write during training, from a copy on the host; not supported for shards, which all
            ranks write.
        total_steps: Number of updates of the whole run.
        facts: Fingerprints of data, vocabulary and weights, which resuming compares.
        ranks: The processes of the run; the first writes.
        on_note: Receives sentences about checkpoints that are invalid or of another run, each once.
    """

    def __init__(
        self,
        directory: RunDirectory,
        *,
        keep: int | Literal["best"],
        in_background: bool,
        total_steps: int,
        facts: Mapping[str, Any],
        ranks: RankContext = SINGLE_PROCESS,
        on_note: Callable[[str], object] = lambda sentence: None,
    ) -> None:
        self._ranks = ranks
        self._on_note = on_note
        self._notes: dict[str, bool] = {}  # sentences, and whether they have been sent
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
            self._write(progress, state)
            self._send_notes()
            return
        if not self._ranks.is_first:
            return
        if self._pool is None:
            self._write(progress, state)
            self._send_notes()
        else:
            self._writing = self._pool.submit(self._write, replace(progress), copy_to_cpu(state))

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
            self._send_notes()

    def _send_notes(self) -> None:
        for sentence in [sentence for sentence, is_sent in self._notes.items() if not is_sent]:
            self._notes[sentence] = True
            self._on_note(sentence)

    @cached_property
    def _run_id(self) -> str:
        return read_identity(self._directory.path).run_id

    def _write(self, progress: Progress, state: dict[str, Any]) -> None:
        step = progress.step
        values, tensors = split_tensors(state)
        files: dict[str, dict[str, Any]] = {}
        for place, tensor in tensors.items():
            file = next((file for prefix, file in FILES.items() if place.startswith(prefix)), OTHERS)
            files.setdefault(file, {})[place] = tensor
        folder = self._directory.checkpoints
        if self._ranks.is_first:
            self._set_aside(folder / f"step-{step}")

        def values_after(stamps: Mapping[str, Stamp]) -> dict[str, Any]:
            return {"state": sealed(values, stamps)}

        write_files = write_sharded if self._ranks.are_sharded else write
        write_files(folder, step, run_id=self._run_id, tensors=files, values=values_after)
        if self._ranks.is_first:
            keep, best = (self._keep, None) if self._keep != "best" else _keep_best(progress)
            prune(
                folder,
                keep=keep,
                best=best,
                run_id=self._run_id,
                on_note=lambda sentence: self._notes.setdefault(sentence, False),
            )

    def _set_aside(self, path: Path) -> None:
        with suppress(OSError):  # writing the checkpoint fails then, with a message
            kept = set_aside(path, self._run_id)
            if kept is not None:
                self._notes.setdefault(f"{path} was not written by this run and is now called {kept.name}", False)


def _keep_best(progress: Progress) -> tuple[int, int | None]:
    """Return how many of the newest checkpoints are kept besides that of the best validation, and its step.

    Two always remain, so that a damaged one costs updates and not the run.
    """
    best = progress.best_step or None
    return (1 if best not in (None, progress.step) else 2), best


def frozen_fingerprint(model: nn.Module, values: Mapping[str, Callable[[], Tensor]] | None = None) -> str | None:
    """Return the SHA-256, in hex, of the parameters that are not trained, which checkpoints leave out; None without.

    Collective if the model is sharded; it is the same then as of the whole model. One tensor is gathered at a time.

    Args:
        model: With its adapters.
        values: Functions that return the values of its frozen parameters before they were quantized, by name; None for
            those of the model.
    """
    if values is None:
        values = {name: partial(_whole, p) for name, p in model.named_parameters() if not p.requires_grad}
    # peft keeps the head that a trained copy replaces; it has no effect.
    values = {name: value for name, value in values.items() if ".original_module." not in name}
    if not values:
        return None
    digest = sha256()
    for name in sorted(values):
        digest.update(name.encode())
        digest.update(bits(values[name]()).numpy().tobytes())
    return digest.hexdigest()


def _whole(parameter: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
