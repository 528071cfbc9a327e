"""The training loop: windows of samples → `bigbatch.Engine` → metrics, validation, samples of text, the saved model.

Counts, schedule and metrics go by updates. Nothing here prints: a `TrainerCallback` is told what happened.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from bigbatch.engine.engine import Engine
from bigbatch.errors import (
    BigbatchError,
    InputError,
    MemoryLimitError,
    ShardedMemoryError,
    WindowAbandonedError,
)
from bigbatch.lm.checkpoint.manager import CheckpointManager, Progress, RunCheckpoint
from bigbatch.lm.config.field_types import CheckpointingMode
from bigbatch.lm.distributed.ranks import SINGLE_PROCESS, RankContext, copy_to_meta, gather_full_model
from bigbatch.lm.files import os_reason
from bigbatch.lm.model.pretrained import save_model
from bigbatch.lm.runs.directory import RunDirectory, as_line
from bigbatch.lm.training.autotune import take, tune
from bigbatch.lm.training.callbacks import MetricsRow, TrainerCallback, metrics_row
from bigbatch.lm.training.callbacks import TrainResult as TrainResult
from bigbatch.lm.training.evaluation import sample_text, seeded, validation_loss
from bigbatch.lm.training.microbatch_limits import enforce_memory_budget, memory_of, microbatch_of
from bigbatch.lm.training.oom_restart import apply_override, restart_smaller
from bigbatch.lm.training.optimizer import make_optimizer, rescale_second_moment
from bigbatch.lm.training.resume import rank_invariants, run_facts
from bigbatch.lm.training.schedule import TrainingSchedule
from bigbatch.lm.training.setup import TrainingSetup
from bigbatch.lm.training.tuning_cache import cache_key, load_cached, save_cached
from bigbatch.rng import random_states, set_random_states


class Trainer:
    """Train what was prepared.

        Trainer(prepared).run(run_directory, listener=listener, should_stop=lambda: False)

    Args:
        setup: Model, data and settings; the model is trained in place.
        checkpoint: Where to go on; None to begin.
        ranks: The processes of the run, all of which do this at the same time.

    Raises:
        InputError: The warm-up is longer than the run, or the model cannot be spread over the ranks.
    """

    def __init__(
        self, setup: TrainingSetup, *, checkpoint: RunCheckpoint | None = None, ranks: RankContext = SINGLE_PROCESS
    ) -> None:
        self.setup = setup
        self.ranks = ranks
        self.config = setup.config
        self.checkpoint = checkpoint
        self.facts = run_facts(setup)
        if ranks.size > 1:
            ranks.check_equal(rank_invariants(setup, self.facts))
        done = Progress() if checkpoint is None else checkpoint.progress
        self.schedule = TrainingSchedule(self.config, setup.training.lengths, step=done.step, cursor=done.cursor)
        self.total_steps, self.warmup_steps = self.schedule.total_steps, self.schedule.warmup_steps
        self.model_setup = setup.model_setup
        self.loss_fn = setup.loss_fn
        self._hollow = copy_to_meta(setup.model) if ranks.are_sharded else None
        sync = ranks.parallelize(setup.model)
        longest = max(setup.training.lengths)
        microbatch = microbatch_of(self.config, longest=longest, ranks=ranks)
        if ranks.are_sharded and microbatch != "auto":
            microbatch = apply_override(self.config.out, microbatch, longest=longest)
        self.optimizer = make_optimizer(setup.model, self.config, setup.device_spec)
        if checkpoint is None:  # what was saved has been through it
            self.config.batch_scaling().apply(self.optimizer)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.schedule.lr_factor)
        self.engine = Engine(
            setup.model,
            self.optimizer,
            self.loss_fn,
            microbatch=microbatch,
            memory=memory_of(self.config, setup.device_spec, ranks=ranks),
            collate=setup.collate,
            lengths=lambda samples: [len(sample["input_ids"]) for sample in samples],
            layout=self.model_setup.layout,
            cuda_graphs=self.model_setup.uses_cuda_graphs and not ranks.are_sharded,
            max_grad_norm=self.config.max_grad_norm,
            scheduler=self.scheduler,
            scaler=setup.device_spec.scaler(),
            sync=sync,
        )
        if ranks.are_sharded:
            self.engine.sync.set_padding_microbatch(self._spare())

    def _spare(self) -> dict[str, torch.Tensor]:
        """Give what a rank runs for the sake of the others that has fewer micro-batches than they, or none."""
        training = self.setup.training
        shortest = min(range(len(training)), key=training.lengths.__getitem__)
        microbatch = self.setup.collate([training[shortest]])
        return {name: tensor.to(self.setup.device_spec.device) for name, tensor in microbatch.items()}

    def tune(self, cache: Path | None = None) -> Path | None:
        """Choose the micro-batch where that is asked for, or take what a run before chose for the same.

        Where memory is what limits it, and nobody decided about it, activations are also tried computed anew in every
        second layer, and in all; what is fastest is taken.

        Args:
            cache: A run directory; it and those beside it are looked through. None to choose anew.

        Returns:
            The run directory that the choice comes from, where it is not a new one.

        Raises:
            InputError: A single sequence does not fit in memory.
        """
        if self.engine.microbatch != "auto":
            return None
        layers, budget = self.model_setup.layers, enforce_memory_budget(self.engine.memory, self.setup)
        key = cache_key(self.setup)
        kept = None if cache is None else load_cached(cache, key, usable_bytes=budget.usable_bytes)
        found = self.ranks.broadcast(kept)
        if found is not None:
            take(self.engine, layers, found.level, found.choice)
            return Path(found.folder)
        lengths = self.setup.training.lengths
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        samples = self.fetch(list({*self.shard_window(self.schedule.first_window()), longest}))
        try:
            tune(self.engine, layers, samples, modes=self.config.gradient_checkpointing == "auto")
        except MemoryLimitError as error:
            raise InputError(
                f"{error} Here that is --max-length, --gradient-checkpointing, --precision bf16-weights and "
                "--lora-rank."
            ) from error
        return None

    @property
    def checkpointing_mode(self) -> CheckpointingMode:
        """What is computed anew in backward."""
        return "none" if self.model_setup.layers is None else self.model_setup.layers.mode

    def shard_window(self, window: list[int]) -> list[int]:
        """Give the samples of a window that this rank runs."""
        return self.ranks.shard_window(window, self.setup.training.lengths)

    def run(
        self,
        directory: RunDirectory,
        *,
        callback: TrainerCallback,
        should_stop: Callable[[], bool] = lambda: False,
        should_abandon: Callable[[], bool] = lambda: False,
    ) -> TrainResult:
        """Train to the end, or until ``should_stop()`` is true after an update; then save the model.

        The seed decides about dropout too; the caller's random state is left as it was. State is saved between updates
        alone: what is given up in the middle of one has not been.

        Args:
            directory: Receives metrics, checkpoints and model.
            callback: Told of updates, validations and samples.
            should_stop: Asked after every update, and again after what was validated and written then.
            should_abandon: Asked within an update: whether to drop it and to stop as after the one before.

        Raises:
            BigbatchError: Update after update is skipped, or something cannot be written.
        """
        started_s = time.perf_counter()
        if self.checkpoint is not None and self.checkpoint.engine["engine"]["choice"] is not None:
            enforce_memory_budget(self.engine.memory, self.setup)  # the limit stands; the choice comes with the state
        elif self.engine.choice is None:
            self.tune(None if self.checkpoint is None else directory.path)
        checkpoints = CheckpointManager(
            directory,
            keep=self.config.keep,
            in_background=self.config.async_checkpoint,
            total_steps=self.total_steps,
            facts=self.facts,
            ranks=self.ranks,
        )
        with directory, seeded(self.setup, rank=self.ranks.rank), self._repeatable():
            now = self._begin(directory)
            if self.engine.choice is not None and self.ranks.is_first:
                save_cached(
                    directory.path,
                    self.engine.choice,
                    cache_key(self.setup),
                    checkpointing_mode=self.checkpointing_mode,
                )
            with checkpoints.open():
                if now.pending_metrics_row is not None:
                    self._validate_and_log(now.pending_metrics_row, now, directory, callback)
                    now.pending_metrics_row = None
                stopping = False
                for window in self.schedule.windows(now.step, now.cursor):
                    stopping = not self._try_step(window, now, directory, callback, should_stop, should_abandon)
                    if now.step == self.total_steps:
                        directory.discard_model()  # one beside the last checkpoint is taken for the last
                    if now.step % self.config.checkpoint_every == 0 or now.step == self.total_steps or stopping:
                        checkpoints.save(self.engine, now, self.checkpointing_mode)
                    if stopping:
                        break
            self.engine.release_cuda_graphs()
            self._save_model(directory)
        finished = now.step == self.total_steps
        return TrainResult(now.step, now.skipped, finished, now.validation_loss, time.perf_counter() - started_s)

    def _begin(self, directory: RunDirectory) -> Progress:
        """Take up a run where it was saved, or begin."""
        checkpoint = self.checkpoint
        if checkpoint is None:
            directory.truncate_to(0, 0)
            return Progress()
        chosen = checkpoint.engine["engine"]["choice"] is not None and self.config.gradient_checkpointing == "auto"
        if self.model_setup.layers is not None and chosen:
            self.model_setup.layers.set_checkpointing(checkpoint.checkpointing_mode)
        try:
            self.engine.load_state_dict(checkpoint.engine_of(self.ranks, [self.setup.device_spec.device]))
        except ValueError as error:
            raise InputError(f"{checkpoint.path} is not of this model: {error}") from error
        now = replace(checkpoint.progress)
        written_again = 0 if now.pending_metrics_row is None else len(as_line(now.pending_metrics_row))
        directory.truncate_to(now.metrics_bytes - written_again, now.quarantine_bytes)
        return now

    def _try_step(
        self,
        window: list[int],
        now: Progress,
        directory: RunDirectory,
        callback: TrainerCallback,
        should_stop: Callable[[], bool],
        should_abandon: Callable[[], bool],
    ) -> bool:
        """Make one update and what belongs to it; tell whether to go on."""
        devices = [self.setup.device_spec.device]
        before = random_states(devices)
        self._change_batch(now)
        try:
            row, told_to_stop = self._update(now.step + 1, window, should_stop, should_abandon)
        except WindowAbandonedError:
            set_random_states(before, devices)
            return False
        now.step += 1
        now.cursor += len(window)
        row["sequences"] = len(window)
        if self.schedule.schedule is not None:
            row["global_batch"] = now.batch
        self._count_skipped(row, now)
        if row["skipped"] and row["skipped"] != "no items":
            directory.write_quarantine({"step": now.step, "reason": row["skipped"], "samples": sorted(window)})
        callback.on_update(row)
        last = now.step == self.total_steps
        stopping = not last and told_to_stop()
        if stopping:
            now.pending_metrics_row = row
            directory.write_metrics(row)
        else:
            self._validate_and_log(row, now, directory, callback)
        if now.skipped_in_a_row >= self.config.max_skipped:
            raise BigbatchError(
                f"the last {now.skipped_in_a_row} updates were skipped ({row['skipped']}), so the model does not learn "
                "any more: try a lower --lr, or another --precision."
            )
        return last or not (stopping or told_to_stop())

    def _change_batch(self, now: Progress) -> None:
        """Note the batch of the next window, where a schedule decides it; re-base Adam's second moment at a change."""
        if self.schedule.schedule is None:
            return
        batch = self.schedule.batch_after(now.cursor)
        assert batch is not None, "a schedule is in sequences"
        if self.config.rebase_second_moment and now.batch and batch != now.batch:
            rescale_second_moment(self.optimizer, now.batch / batch)
        now.batch = batch

    def _validate_and_log(
        self, row: MetricsRow, now: Progress, directory: RunDirectory, callback: TrainerCallback
    ) -> None:
        """Validate and write where it is time to, and enter the update into the metrics."""
        if self._validates_after(now.step):
            row["validation_loss"] = now.validation_loss = self.validate()
        directory.write_metrics(row)
        if "validation_loss" in row:
            callback.on_validation(now.step, row["validation_loss"])
        if now.step in (self.total_steps // 2, self.total_steps) and (self.ranks.is_first or self.ranks.are_sharded):
            callback.on_sample(now.step, self.sample_text(self.config.sample_prompt))

    def _save_model(self, directory: RunDirectory) -> None:
        model = self.setup.model
        if self._hollow is not None:
            model = gather_full_model(model, self._hollow)
        if not self.ranks.is_first:
            return
        try:
            save_model(model, self.setup.tokenizer, directory.model)
        except (OSError, SafetensorError) as error:
            raise BigbatchError(
                f"{directory.model} cannot be written: {os_reason(error)}. The checkpoints are whole: bigbatch resume "
                f"{directory.path} goes on from there."
            ) from error

    def _update(
        self, step: int, window: list[int], should_stop: Callable[[], bool], should_abandon: Callable[[], bool]
    ) -> tuple[MetricsRow, Callable[[], bool]]:
        """Make one update; give its line, and what to ask whether to stop: of several ranks, all have decided."""
        lr = float(self.scheduler.get_last_lr()[0])
        try:
            report = self.engine.step(
                self.fetch(self.shard_window(window)), should_abandon=should_abandon, should_stop=should_stop
            )
        except ShardedMemoryError as error:
            now, folder = self.engine.microbatch, self.config.out
            assert now != "auto", "sharded runs are told their micro-batch"
            assert folder is not None, "a run has its folder by now"
            longest = max(self.setup.training.lengths)
            restart_smaller(error, now, folder, longest=longest, rank=self.ranks.rank)
        row = metrics_row(step, report, lr=lr, clock=not self.config.deterministic)
        ranks = report.ranks
        return row, should_stop if ranks is None else lambda: ranks.stopping

    def _validates_after(self, step: int) -> bool:
        every = self.config.validation_every_of(self.total_steps)
        return self.setup.validation is not None and (step % every == 0 or step == self.total_steps)

    @staticmethod
    def _count_skipped(row: MetricsRow, now: Progress) -> None:
        now.skipped_in_a_row = now.skipped_in_a_row + 1 if row["skipped"] else 0
        now.skipped += bool(row["skipped"])

    def fetch(self, window: list[int]) -> list[dict[str, torch.Tensor]]:
        """Fetch the samples of a window, longest first: neighbours of like length waste least on padding."""
        lengths = self.setup.training.lengths
        return [self.setup.training[i] for i in sorted(window, key=lambda i: -lengths[i])]

    def validate(self) -> float:
        """Compute the mean loss over (a fixed sample of) the held-out sequences, in nats per token."""
        return validation_loss(self.setup, self.engine)

    def sample_text(self, prompt: str) -> str:
        """Let the model go on with a text; the random state of training is left as it was."""
        return sample_text(self.setup, self.engine, prompt)

    @contextmanager
    def _repeatable(self) -> Iterator[None]:
        """Let torch add in one order, where the same bytes are asked for."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(before or self.config.deterministic)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
