"""The training loop: windows of samples → `bigbatch.Engine` → metrics, validation, samples of text, the saved model.

Counts, schedule and metrics go by updates. Nothing here prints: a `Listener` is told what happened.
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
from bigbatch.lm.checkpoint.manager import Keeper, Progress, Saved
from bigbatch.lm.config.field_types import Recompute
from bigbatch.lm.distributed.ranks import ALONE, Ranks, gathered, hollow
from bigbatch.lm.model.pretrained import save_model
from bigbatch.lm.runs.directory import RunDirectory, as_line
from bigbatch.lm.training.autotune import take, tune
from bigbatch.lm.training.callbacks import Listener, Row, metrics_row
from bigbatch.lm.training.callbacks import Outcome as Outcome
from bigbatch.lm.training.evaluation import seeded, validation_loss, written
from bigbatch.lm.training.microbatch_limits import held_room, memory_of, microbatch_of
from bigbatch.lm.training.oom_restart import begin_again, kept
from bigbatch.lm.training.optimizer import make_optimizer, rebase
from bigbatch.lm.training.resume import facts_of, shared_facts
from bigbatch.lm.training.schedule import Course
from bigbatch.lm.training.setup import Prepared
from bigbatch.lm.training.tuning_cache import fingerprint, recall, remember
from bigbatch.rng import random_states, set_random_states


class Trainer:
    """Train what was prepared.

        Trainer(prepared).run(run_directory, listener=listener, should_stop=lambda: False)

    Args:
        prepared: Model, data and settings; the model is trained in place.
        saved: Where to go on; None to begin.
        ranks: The processes of the run, all of which do this at the same time.

    Raises:
        InputError: The warm-up is longer than the run, or the model cannot be spread over the ranks.
    """

    def __init__(self, prepared: Prepared, *, saved: Saved | None = None, ranks: Ranks = ALONE) -> None:
        self.prepared = prepared
        self.ranks = ranks
        self.config = prepared.config
        self.saved = saved
        self.facts = facts_of(prepared)
        if ranks.size > 1:
            ranks.check_alike(shared_facts(prepared, self.facts))
        done = Progress() if saved is None else saved.progress
        self.course = Course(self.config, prepared.training.lengths, step=done.step, cursor=done.cursor)
        self.total_steps, self.warmup_steps = self.course.total_steps, self.course.warmup_steps
        self.arrangement = prepared.arrangement
        self.loss_fn = prepared.loss_fn
        self._hollow = hollow(prepared.model) if ranks.are_sharded else None
        sync = ranks.spread(prepared.model)
        longest = max(prepared.training.lengths)
        microbatch = microbatch_of(self.config, longest=longest, ranks=ranks)
        if ranks.are_sharded and microbatch != "auto":
            microbatch = kept(self.config.out, microbatch, longest=longest)
        self.optimizer = make_optimizer(prepared.model, self.config, prepared.machine)
        if saved is None:  # what was saved has been through it
            self.config.batch_scaling().apply(self.optimizer)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.course.lr_factor)
        self.engine = Engine(
            prepared.model,
            self.optimizer,
            self.loss_fn,
            microbatch=microbatch,
            memory=memory_of(self.config, prepared.machine, ranks=ranks),
            collate=prepared.collate,
            lengths=lambda samples: [len(sample["input_ids"]) for sample in samples],
            layout=self.arrangement.layout,
            cuda_graphs=self.arrangement.records and not ranks.are_sharded,
            max_grad_norm=self.config.max_grad_norm,
            scheduler=self.scheduler,
            scaler=prepared.machine.scaler(),
            sync=sync,
        )
        if ranks.are_sharded:
            self.engine.accumulator.spare = self._spare()

    def _spare(self) -> dict[str, torch.Tensor]:
        """Give what a rank runs for the sake of the others that has fewer micro-batches than they, or none."""
        training = self.prepared.training
        shortest = min(range(len(training)), key=training.lengths.__getitem__)
        microbatch = self.prepared.collate([training[shortest]])
        return {name: tensor.to(self.prepared.machine.device) for name, tensor in microbatch.items()}

    def tune(self, beside: Path | None = None) -> Path | None:
        """Choose the micro-batch where that is asked for, or take what a run before chose for the same.

        Where memory is what limits it, and nobody decided about it, activations are also tried computed anew in every
        second layer, and in all; what is fastest is taken.

        Args:
            beside: A run directory; it and those beside it are looked through. None to choose anew.

        Returns:
            The run directory that the choice comes from, where it is not a new one.

        Raises:
            InputError: A single sequence does not fit in memory.
        """
        if self.engine.microbatch != "auto":
            return None
        layers, room = self.arrangement.layers, held_room(self.engine.memory, self.prepared)
        key = fingerprint(self.prepared)
        kept = None if beside is None else recall(beside, key, usable_bytes=room.usable_bytes)
        found = self.ranks.tell(kept)
        if found is not None:
            take(self.engine, layers, found.level, found.choice)
            return Path(found.folder)
        lengths = self.prepared.training.lengths
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        samples = self.fetch(list({*self.share(self.course.first_window()), longest}))
        try:
            tune(self.engine, layers, samples, levels=self.config.gradient_checkpointing == "auto")
        except MemoryLimitError as error:
            raise InputError(
                f"{error} Here that is --max-length, --gradient-checkpointing, --precision bf16-weights and "
                "--lora-rank."
            ) from error
        return None

    @property
    def level(self) -> Recompute:
        """What is computed anew in backward."""
        return "none" if self.arrangement.layers is None else self.arrangement.layers.level

    def share(self, window: list[int]) -> list[int]:
        """Give the samples of a window that this rank runs."""
        return self.ranks.share(window, self.prepared.training.lengths)

    def run(
        self,
        directory: RunDirectory,
        *,
        listener: Listener,
        should_stop: Callable[[], bool] = lambda: False,
        give_up: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Train to the end, or until ``should_stop()`` is true after an update; then save the model.

        The seed decides about dropout too; the caller's random state is left as it was. State is saved between updates
        alone: what is given up in the middle of one has not been.

        Args:
            directory: Receives metrics, checkpoints and model.
            listener: Told of updates, validations and samples.
            should_stop: Asked after every update, and again after what was validated and written then.
            give_up: Asked within an update: whether to drop it and to stop as after the one before.

        Raises:
            BigbatchError: Update after update is skipped, or something cannot be written.
        """
        started_s = time.perf_counter()
        if self.saved is not None and self.saved.engine["engine"]["choice"] is not None:
            held_room(self.engine.memory, self.prepared)  # the limit stands; the choice comes with the state
        elif self.engine.choice is None:
            self.tune(None if self.saved is None else directory.path)
        keeper = Keeper(
            directory,
            keep=self.config.keep,
            beside=self.config.async_checkpoint,
            total_steps=self.total_steps,
            facts=self.facts,
            ranks=self.ranks,
        )
        with directory, seeded(self.prepared, rank=self.ranks.rank), self._repeatable():
            now = self._begin(directory)
            if self.engine.choice is not None and self.ranks.is_first:
                remember(directory.path, self.engine.choice, fingerprint(self.prepared), level=self.level)
            with keeper.open():
                if now.owed is not None:
                    self._look(now.owed, now, directory, listener)
                    now.owed = None
                stopping = False
                for window in self.course.windows(now.step, now.cursor):
                    stopping = not self._try_step(window, now, directory, listener, should_stop, give_up)
                    if now.step == self.total_steps:
                        directory.discard_model()  # one beside the last checkpoint is taken for the last
                    if now.step % self.config.checkpoint_every == 0 or now.step == self.total_steps or stopping:
                        keeper.save(self.engine, now, self.level)
                    if stopping:
                        break
            self.engine.release()
            self._save_model(directory)
        finished = now.step == self.total_steps
        return Outcome(now.step, now.skipped, finished, now.validation_loss, time.perf_counter() - started_s)

    def _begin(self, directory: RunDirectory) -> Progress:
        """Take up a run where it was saved, or begin."""
        saved = self.saved
        if saved is None:
            directory.rewind(0, 0)
            return Progress()
        chosen = saved.engine["engine"]["choice"] is not None and self.config.gradient_checkpointing == "auto"
        if self.arrangement.layers is not None and chosen:
            self.arrangement.layers.recompute(saved.level)
        try:
            self.engine.load_state_dict(saved.engine_of(self.ranks, [self.prepared.machine.device]))
        except ValueError as error:
            raise InputError(f"{saved.path} is not of this model: {error}") from error
        now = replace(saved.progress)
        written_again = 0 if now.owed is None else len(as_line(now.owed))
        directory.rewind(now.metrics_bytes - written_again, now.quarantine_bytes)
        return now

    def _try_step(
        self,
        window: list[int],
        now: Progress,
        directory: RunDirectory,
        listener: Listener,
        should_stop: Callable[[], bool],
        give_up: Callable[[], bool],
    ) -> bool:
        """Make one update and what belongs to it; tell whether to go on."""
        devices = [self.prepared.machine.device]
        before = random_states(devices)
        self._change_batch(now)
        try:
            row, told_to_stop = self._update(now.step + 1, window, should_stop, give_up)
        except WindowAbandonedError:
            set_random_states(before, devices)
            return False
        now.step += 1
        now.cursor += len(window)
        row["sequences"] = len(window)
        if self.course.schedule is not None:
            row["global_batch"] = now.batch
        self._count_skipped(row, now)
        if row["skipped"] and row["skipped"] != "no items":
            directory.write_quarantine({"step": now.step, "reason": row["skipped"], "samples": sorted(window)})
        listener.updated(row)
        last = now.step == self.total_steps
        stopping = not last and told_to_stop()
        if stopping:
            now.owed = row
            directory.write_metrics(row)
        else:
            self._look(row, now, directory, listener)
        if now.skipped_in_a_row >= self.config.max_skipped:
            raise BigbatchError(
                f"the last {now.skipped_in_a_row} updates were skipped ({row['skipped']}), so the model does not learn "
                "any more: try a lower --lr, or another --precision."
            )
        return last or not (stopping or told_to_stop())

    def _change_batch(self, now: Progress) -> None:
        """Note the batch of the next window, where a schedule decides it; re-base Adam's second moment at a change."""
        if self.course.schedule is None:
            return
        batch = self.course.batch_after(now.cursor)
        assert batch is not None, "a schedule is in sequences"
        if self.config.rebase_second_moment and now.batch and batch != now.batch:
            rebase(self.optimizer, now.batch / batch)
        now.batch = batch

    def _look(self, row: Row, now: Progress, directory: RunDirectory, listener: Listener) -> None:
        """Validate and write where it is time to, and enter the update into the metrics."""
        if self._validates_after(now.step):
            row["validation_loss"] = now.validation_loss = self.validate()
        directory.write_metrics(row)
        if "validation_loss" in row:
            listener.validated(now.step, row["validation_loss"])
        if now.step in (self.total_steps // 2, self.total_steps) and (self.ranks.is_first or self.ranks.are_sharded):
            listener.sampled(now.step, self.write(self.config.sample_prompt))

    def _save_model(self, directory: RunDirectory) -> None:
        model = self.prepared.model
        if self._hollow is not None:
            model = gathered(model, self._hollow)
        if not self.ranks.is_first:
            return
        try:
            save_model(model, self.prepared.tokenizer, directory.model)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise BigbatchError(
                f"{directory.model} cannot be written: {reason}. The checkpoints are whole: bigbatch resume "
                f"{directory.path} goes on from there."
            ) from error

    def _update(
        self, step: int, window: list[int], should_stop: Callable[[], bool], give_up: Callable[[], bool]
    ) -> tuple[Row, Callable[[], bool]]:
        """Make one update; give its line, and what to ask whether to stop: of several ranks, all have decided."""
        lr = float(self.scheduler.get_last_lr()[0])
        try:
            report = self.engine.step(self.fetch(self.share(window)), give_up=give_up, stopping=should_stop)
        except ShardedMemoryError as error:
            now, folder = self.engine.microbatch, self.config.out
            assert now != "auto", "sharded runs are told their micro-batch"
            assert folder is not None, "a run has its folder by now"
            longest = max(self.prepared.training.lengths)
            begin_again(error, now, folder, longest=longest, rank=self.ranks.rank)
        row = metrics_row(step, report, lr=lr, clock=not self.config.deterministic)
        ranks = report.ranks
        return row, should_stop if ranks is None else lambda: ranks.stopping

    def _validates_after(self, step: int) -> bool:
        every = self.config.validation_every_of(self.total_steps)
        return self.prepared.validation is not None and (step % every == 0 or step == self.total_steps)

    @staticmethod
    def _count_skipped(row: Row, now: Progress) -> None:
        now.skipped_in_a_row = now.skipped_in_a_row + 1 if row["skipped"] else 0
        now.skipped += bool(row["skipped"])

    def fetch(self, window: list[int]) -> list[dict[str, torch.Tensor]]:
        """Fetch the samples of a window, longest first: neighbours of like length waste least on padding."""
        lengths = self.prepared.training.lengths
        return [self.prepared.training[i] for i in sorted(window, key=lambda i: -lengths[i])]

    def validate(self) -> float:
        """Compute the mean loss over (a fixed sample of) the held-out sequences, in nats per token."""
        return validation_loss(self.prepared, self.engine)

    def write(self, prompt: str) -> str:
        """Let the model go on with a text; the random state of training is left as it was."""
        return written(self.prepared, self.engine, prompt)

    @contextmanager
    def _repeatable(self) -> Iterator[None]:
        """Let torch add in one order, where the same bytes are asked for."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(before or self.config.deterministic)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
