"""The micro-batch of ``--microbatch auto`` during a run: chosen once, cached, and chosen again if it was timed badly.

checkpoint | cached choice | `bigbatch.lm.training.autotune.choose_microbatch` → engine → much faster updates? → again
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigbatch.engine.engine import Engine
from bigbatch.lm.distributed.ranks import RankContext
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.training.autotune import choose_microbatch, describe
from bigbatch.lm.training.callbacks import MetricsRow
from bigbatch.lm.training.microbatch_limits import enforce_memory_budget
from bigbatch.lm.training.setup import TrainingSetup
from bigbatch.lm.training.speed_watch import SpeedWatch
from bigbatch.lm.training.tuning_cache import cache_key, save_cached
from bigbatch.memory.usage import restart_peak


class MicrobatchTuner:
    """Sets the micro-batch of an engine that was created with ``microbatch="auto"``; does nothing to others.

    Args:
        engine: Of the run.
        setup: Model, data and settings of the engine.
        make_samples: Returns the samples to tune with.
        ranks: The processes of the run.
        is_saved: Whether a checkpoint holds the micro-batch, which is loaded with the engine's state.
    """

    def __init__(
        self,
        engine: Engine,
        setup: TrainingSetup,
        make_samples: Callable[[], list[Any]],
        *,
        ranks: RankContext,
        is_saved: bool,
    ) -> None:
        self._engine = engine
        self._setup = setup
        self._make_samples = make_samples
        self._ranks = ranks
        self._is_saved = is_saved
        self._is_tuned = engine.microbatch != "auto"
        self._speed_watch = SpeedWatch()

    def tune(self, cache: Path | None, *, progress: Callable[[str], object]) -> Path | None:
        """Choose the micro-batch if that was not done before. Collective.

        Args:
            cache: A run directory; it and its siblings are searched for a cached choice. None to tune always.
            progress: Receives a message before tuning.

        Returns:
            The run directory of a cached choice, else None.

        Raises:
            InputError: A single sequence does not fit in memory.
        """
        if self._is_tuned or self._engine.choice is not None:
            return None
        budget, origin = enforce_memory_budget(self._engine.memory, self._setup), None
        if not self._is_saved:
            progress("choosing the micro-batch")
            origin = self._choose(cache, budget.usable_bytes)
        self._is_tuned = True
        return origin

    def retune_if_faster(self, row: MetricsRow, directory: RunDirectory, on_note: Callable[[str], object]) -> None:
        """Choose again if updates are much faster than the micro-batch was timed, in a single process."""
        choice = self._engine.choice
        if choice is None or self._ranks.size > 1:
            return
        factor = self._speed_watch.times_faster(row, choice)
        if factor is None:
            return
        on_note(
            f"updates are {factor:.2g} times as fast as the micro-batch was timed, when the machine was busy: choosing "
            "it again"
        )
        self._choose(None, enforce_memory_budget(self._engine.memory, self._setup).usable_bytes)
        on_note(f"{self._engine.choice}{describe(self._setup.model_setup.checkpointing_mode)}")
        self.save_choice(directory)

    def save_choice(self, directory: RunDirectory) -> None:
        """Cache the choice in the run directory, for later runs."""
        if self._engine.choice is not None and self._ranks.is_first:
            mode = self._setup.model_setup.checkpointing_mode
            save_cached(directory.path, self._engine.choice, cache_key(self._setup), checkpointing_mode=mode)

    def _choose(self, cache: Path | None, usable_bytes: int) -> Path | None:
        origin = choose_microbatch(
            self._engine,
            self._setup,
            self._make_samples,
            ranks=self._ranks,
            cache=cache,
            usable_bytes=usable_bytes,
        )
        restart_peak(self._engine.accumulator.device)  # of larger micro-batches that were tried
        return origin
