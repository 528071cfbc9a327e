"""The training loop: windows of samples → `bigbatch.Engine` → metrics, validation, samples of text, the saved model.

Long because one class is the whole life of a run.

Counts, schedule and metrics are per update. Nothing here prints: events go to a `TrainerCallback`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bigbatch.errors import BigbatchError, InputError, ShardedMemoryError, WindowAbandonedError, first_line
from bigbatch.lm.checkpoint.manager import CheckpointManager, frozen_fingerprint
from bigbatch.lm.checkpoint.run_checkpoint import Progress, RunCheckpoint
from bigbatch.lm.distributed.ranks import SINGLE_PROCESS, RankContext
from bigbatch.lm.model.compilation import eager_note
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.runs.samples import Sample, keep_samples, write_sample
from bigbatch.lm.training.best_checkpoint import (
    check_comparable,
    check_validation,
    load_best,
    record_validation,
    stops_early,
)
from bigbatch.lm.training.callbacks import MetricsRow, TrainerCallback, metrics_row
from bigbatch.lm.training.callbacks import TrainResult as TrainResult
from bigbatch.lm.training.engine_factory import make_training_engine
from bigbatch.lm.training.evaluation import (
    deterministic_algorithms,
    evaluate,
    seeded,
    validation_loss,
    validation_metrics,
)
from bigbatch.lm.training.fingerprint_log import with_fingerprints
from bigbatch.lm.training.microbatch_tuner import MicrobatchTuner
from bigbatch.lm.training.model_saver import ModelSaver
from bigbatch.lm.training.oom_restart import restart_smaller
from bigbatch.lm.training.optimizer import make_optimizer, rescale_second_moment
from bigbatch.lm.training.rank_invariants import rank_invariants
from bigbatch.lm.training.reference import prepare_reference, save_reference
from bigbatch.lm.training.resume import run_facts, weights_fingerprint
from bigbatch.lm.training.schedule import TrainingSchedule
from bigbatch.lm.training.setup import TrainingSetup, parallelize
from bigbatch.lm.training.text_sample import TextSample
from bigbatch.lm.training.window_routing import run_update
from bigbatch.rng import random_states, set_random_states


@dataclass(frozen=True)
class _Session:
    """The arguments of `Trainer.run`."""

    directory: RunDirectory
    callback: TrainerCallback
    should_stop: Callable[[], bool]
    should_abandon: Callable[[], bool]
    on_note: Callable[[str], object]


class Trainer:
    """The training loop of one run.

        Trainer(setup).run(directory, callback=callback, should_stop=lambda: False)

    Args:
        setup: Model, data and settings; the model is trained in place.
        checkpoint: Checkpoint to resume from; None for a new run.
        ranks: The processes of the run. Collective.

    Raises:
        InputError: The warm-up is longer than the run, a setting needs validation data and there is none, the prompt
            of text samples uses every position, or the model cannot be parallelized over the ranks.
    """

    def __init__(
        self, setup: TrainingSetup, *, checkpoint: RunCheckpoint | None = None, ranks: RankContext = SINGLE_PROCESS
    ) -> None:
        self.setup = setup
        self.ranks = ranks
        self.config = setup.config
        check_validation(self.config, setup.validation)
        self.text_sample = TextSample(setup) if self.config.generates_text else None
        self.checkpoint = checkpoint
        self.facts = run_facts(setup)
        self.initial_facts = self.facts | ({} if checkpoint else {"weights_sha256": weights_fingerprint(setup)})
        if ranks.size > 1:
            ranks.check_equal(rank_invariants(setup, self.facts))
        done = Progress() if checkpoint is None else checkpoint.progress
        self.schedule = TrainingSchedule(
            self.config, setup.training.lengths, order=setup.order, step=done.step, cursor=done.cursor
        )
        self.total_steps, self.warmup_steps = self.schedule.total_steps, self.schedule.warmup_steps
        self.model_setup = setup.model_setup
        self._saver = ModelSaver(setup, ranks)
        sync = parallelize(setup, ranks)
        if ranks.are_sharded:
            self.facts["frozen_sha256"] = self.initial_facts["frozen_sha256"] = frozen_fingerprint(setup.model)
        self.optimizer = make_optimizer(setup.model, self.config, setup.device_spec)
        if checkpoint is None:  # a saved optimizer is scaled already
            self.config.batch_scaling().apply(self.optimizer)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.schedule.lr_factor)
        self.engine = make_training_engine(setup, self.optimizer, scheduler=self.scheduler, ranks=ranks, sync=sync)
        self._tuner = MicrobatchTuner(
            self.engine, setup, self._tuning_samples, ranks=ranks, is_saved=self._choice_is_saved
        )

    def tune(self, cache: Path | None = None, *, progress: Callable[[str], object] = lambda words: None) -> Path | None:
        """Set the micro-batch of ``--microbatch auto``, once: that of the checkpoint, a cached one, or a measured one.

        The only place that starts tuning; `run` calls it, so calling it before is optional. Collective.

        Args:
            cache: A run directory; it and its siblings are searched for a cached choice. None to tune always.
            progress: Receives a message before tuning.

        Returns:
            The run directory of a cached choice, else None.

        Raises:
            InputError: A single sequence does not fit in memory.
        """
        return self._tuner.tune(cache, progress=progress)

    def prepare(self, folder: Path | None = None, *, progress: Callable[..., object] = lambda *words: None) -> None:
        """Compute what the loss needs of the weights that the run starts with, once; `run` calls it. Collective."""
        prepare_reference(self.setup, self.engine, self.ranks, folder, progress)

    @property
    def _choice_is_saved(self) -> bool:
        """Whether the checkpoint holds the micro-batch, which is then loaded with the engine's state."""
        return self.checkpoint is not None and self.checkpoint.engine["engine"]["choice"] is not None

    def _tuning_samples(self) -> list[dict[str, torch.Tensor]]:
        longest = int(self.setup.training.lengths.argmax())
        return self.fetch(list({*self.shard_window(self.schedule.first_window()), longest}))

    def shard_window(self, window: list[int]) -> list[int]:
        """Return this rank's samples of a window."""
        return self.ranks.shard_window(window, self.setup.training.lengths, quantum=self.config.quantum_in_use)

    def run(
        self,
        directory: RunDirectory,
        *,
        callback: TrainerCallback,
        should_stop: Callable[[], bool] = lambda: False,
        should_abandon: Callable[[], bool] = lambda: False,
        on_note: Callable[[str], object] = lambda sentence: None,
    ) -> TrainResult:
        """Train to the end, or until ``should_stop()`` is true after an update; then save the model.

        The seed covers dropout too; the caller's random state is restored. An abandoned update leaves no trace.

        Args:
            directory: Receives metrics, checkpoints and model.
            callback: Receives updates, validations and text samples.
            should_stop: Called after every update, and again after its validation and its metrics.
            should_abandon: Called within an update: whether to discard it, and to stop as after the update before.
            on_note: Receives sentences, such as that a checkpoint in the run directory is invalid.

        Raises:
            BigbatchError: Too many updates in a row are skipped, or a file cannot be written.
        """
        started_s = time.perf_counter()
        self.tune(None if self.checkpoint is None else directory.path)
        self.prepare(directory.path)
        checkpoints = CheckpointManager(
            directory,
            keep=self.config.resolved_keep,
            in_background=self.config.async_checkpoint,
            total_steps=self.total_steps,
            facts=self.facts,
            ranks=self.ranks,
            on_note=on_note,
        )
        with directory, seeded(self.setup, rank=self.ranks.rank), deterministic_algorithms(self.config.deterministic):
            now = self._begin(directory, on_note)
            self._tuner.save_choice(directory)
            callback = with_fingerprints(callback, self.setup, self.engine, directory.path, done=now.step)
            if self.ranks.is_first:
                save_reference(self.setup, directory.path)
            with checkpoints.open():
                self._train(now, checkpoints, _Session(directory, callback, should_stop, should_abandon, on_note))
            if (note := eager_note(self.model_setup.layers, self.ranks.all_gather)) is not None:
                on_note(note)
            self.engine.release_cuda_graphs()
            saved_step = now.step
            if self._has_ended(now) and self.config.resolved_keep == "best":
                saved_step = load_best(self.engine, now, directory, self.ranks, on_note)
            with self.engine.whole_weights():
                self._saver.save(directory)
        return TrainResult(
            now.step,
            now.skipped,
            self._has_ended(now),
            now.validation_loss,
            time.perf_counter() - started_s,
            stopped_early=now.step < self.total_steps and self._has_ended(now),
            saved_step=saved_step,
            best_step=now.best_step,
            best_loss=now.best_loss,
        )

    def _has_ended(self, now: Progress) -> bool:
        return now.step == self.total_steps or stops_early(now, self.config)

    def _train(self, now: Progress, checkpoints: CheckpointManager, session: _Session) -> None:
        """Run the windows that are left, with a checkpoint every so many updates and after the last one."""
        if now.pending_metrics_row is not None:
            self._validate_and_log(now.pending_metrics_row, now, session)
            now.pending_metrics_row = None
        if self._has_ended(now):
            return
        for window in self.schedule.windows(now.step, now.cursor):
            stopping = not self._try_step(window, now, session)
            has_ended = self._has_ended(now)
            if has_ended:
                session.directory.discard_model()  # a model next to the last checkpoint counts as the final one
            is_best = now.best_step == now.step and self.config.resolved_keep == "best"
            if now.step % self.config.checkpoint_every == 0 or has_ended or stopping or is_best:
                checkpoints.save(self.engine, now, self.model_setup.checkpointing_mode)
            if stopping or has_ended:
                return

    def _begin(self, directory: RunDirectory, on_note: Callable[[str], object]) -> Progress:
        """Take up a run where it was saved, or begin."""
        checkpoint = self.checkpoint
        if self.ranks.is_first:
            keep_samples(directory.path, 0 if checkpoint is None else checkpoint.progress.step)
        if checkpoint is None:
            directory.truncate_to(0, 0)
            return Progress()
        is_chosen = self._choice_is_saved and self.config.gradient_checkpointing == "auto"
        if self.model_setup.layers is not None and is_chosen:
            self.model_setup.layers.set_checkpointing(checkpoint.checkpointing_mode)
        try:
            checkpoint.restore(self.engine, self.optimizer, self.ranks, self.setup.device_spec.device)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
            raise InputError(f"{checkpoint.path} is not of this model: {first_line(error)}.") from error
        now = replace(checkpoint.progress)
        directory.truncate_to(now.lines_before_pending, now.quarantine_bytes)
        if (note := check_comparable(now, checkpoint, self.facts, self.config, self.ranks)) is not None:
            on_note(note)
        return now

    def _try_step(self, window: list[int], now: Progress, session: _Session) -> bool:
        """Run one update with its metrics and validation; return whether to continue."""
        devices = [self.setup.device_spec.device]
        before = random_states(devices)
        self._change_batch(now)
        try:
            row, should_stop = self._update(now.step + 1, window, session)
        except WindowAbandonedError:
            set_random_states(before, devices)
            return False
        now.step += 1
        now.cursor += len(window)
        row["sequences"] = len(window)
        if self.schedule.schedule is not None:
            row["global_batch"] = now.batch
        now.skipped_in_a_row = now.skipped_in_a_row + 1 if row["skipped"] else 0
        now.skipped += bool(row["skipped"])
        if row["skipped"] and row["skipped"] != "no items":
            session.directory.write_quarantine({"step": now.step, "reason": row["skipped"], "samples": sorted(window)})
        session.callback.on_update(row)
        is_last = now.step == self.total_steps
        if not is_last:
            self._tuner.retune_if_faster(row, session.directory, session.on_note)
        if stopping := not is_last and should_stop():
            now.pending_metrics_row = row
            session.directory.write_metrics(row)
        else:
            self._validate_and_log(row, now, session)
        if now.skipped_in_a_row >= self.config.max_skipped:
            raise BigbatchError(
                f"the last {now.skipped_in_a_row} updates were skipped ({row['skipped']}), so the model does not learn "
                "any more: try a lower --lr, or another --precision."
            )
        return is_last or not (stopping or should_stop())

    def _change_batch(self, now: Progress) -> None:
        """Set the scheduled batch of the next window; at a change, rescale Adam's second moments if configured."""
        if self.schedule.schedule is None:
            return
        batch = self.schedule.batch_after(now.cursor)
        assert batch is not None, "a schedule is in sequences"
        if self.config.rebase_second_moment and now.batch and batch != now.batch:
            rescale_second_moment(self.optimizer, now.batch / batch)
        now.batch = batch

    def _validate_and_log(self, row: MetricsRow, now: Progress, session: _Session) -> None:
        """Validate if due, write the metrics row, and generate text in the middle and at the end of the run."""
        every = self.config.validation_every_of(self.total_steps)
        if self.setup.validation is not None and (now.step % every == 0 or now.step == self.total_steps):
            row |= evaluate(self.setup, self.engine)
            now.validation_loss = row["validation_loss"]
            record_validation(now, row["validation_loss"], min_delta=self.config.early_stopping_min_delta)
        session.directory.write_metrics(row)
        if "validation_loss" in row:
            if losses := {name: row[f"validation_loss/{name}"] for name in self.setup.validation_sets}:
                session.callback.on_evaluation(now.step, losses)
            if means := validation_metrics(row):
                session.callback.on_validation_metrics(now.step, means)
            session.callback.on_validation(now.step, row["validation_loss"])
        is_shown = now.step == self.total_steps // 2 or self._has_ended(now)
        if self.text_sample is not None and is_shown and (self.ranks.is_first or self.ranks.are_sharded):
            text = self.sample_text()
            if self.ranks.is_first:
                write_sample(session.directory.path, Sample(now.step, self.text_sample.prompt, text))
            session.callback.on_sample(now.step, text)

    def _update(self, step: int, window: list[int], session: _Session) -> tuple[MetricsRow, Callable[[], bool]]:
        """Run one update; return its metrics row and the stop condition, on which several ranks have agreed."""
        lr = float(self.scheduler.get_last_lr()[0])
        batch = self.fetch(self.shard_window(window))
        try:
            report, more = run_update(
                self.engine,
                self.model_setup,
                batch,
                should_abandon=session.should_abandon,
                should_stop=session.should_stop,
            )
        except ShardedMemoryError as error:
            restart_smaller(error, self.engine.microbatch, self.setup, rank=self.ranks.rank)
        row = metrics_row(step, report, lr=lr, clock=not self.config.deterministic) | more
        ranks = report.ranks
        return row, session.should_stop if ranks is None else lambda: ranks.stopping

    def fetch(self, window: list[int]) -> list[dict[str, torch.Tensor]]:
        """Return the samples of a window, longest first: neighbours of similar length need little padding."""
        lengths = self.setup.training.lengths
        return self.setup.training.take(sorted(window, key=lambda i: -int(lengths[i])))

    def validate(self) -> float:
        """Compute the mean loss over (a fixed sample of) the held-out sequences, in nats per token."""
        return validation_loss(self.setup, self.engine)

    def sample_text(self) -> str:
        """Generate what follows the prompt of the run, for models that generate text."""
        assert self.text_sample is not None, "asked for with generates_text only"
        return self.text_sample.generate(self.engine)
