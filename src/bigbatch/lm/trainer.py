"""The training loop: windows of samples → `bigbatch.Engine` → metrics, validation, samples of text, the saved model.

Counts, schedule and metrics go by updates. Nothing here prints: a `Listener` is told what happened.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from bigbatch.engine import Engine
from bigbatch.errors import BigbatchError, InputError, MemoryLimitError
from bigbatch.limit import gpu_limit
from bigbatch.lm.continuation import continue_text
from bigbatch.lm.documents import count
from bigbatch.lm.layers import Recompute
from bigbatch.lm.model import save_model
from bigbatch.lm.optimization import lr_factor, make_optimizer
from bigbatch.lm.order import epoch_windows
from bigbatch.lm.prepare import Prepared
from bigbatch.lm.remembered import fingerprint, recall, remember
from bigbatch.lm.rundir import RunDirectory
from bigbatch.lm.tuning import take, tune
from bigbatch.memory import find_room
from bigbatch.plan import TokenBudget
from bigbatch.report import WindowReport

MAX_VALIDATION_SEQUENCES = 128  # evenly spaced over the held-out ones: enough to see learning, a second on two cores
SAMPLE_TOKENS = 64
MOST_SKIPPED = 50  # updates in a row: a float16 scaler that halves from 2^16 each time is long at its end by then

Row = dict[str, Any]


class Listener(Protocol):
    """Whom a run tells what happens, when it happens."""

    def updated(self, row: Row) -> None:
        """Hear of one update: what its line of metrics.jsonl will hold, without a validation loss."""

    def validated(self, step: int, loss: float) -> None:
        """Hear of a validation: the mean loss in nats per token."""

    def sampled(self, step: int, text: str) -> None:
        """Hear what the model writes by now."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: Updates done, the skipped ones included: each had its batch.
        skipped: How many of them changed nothing, for want of items or of finite gradients.
        finished: Whether that is all; False if it was told to stop.
        validation_loss: The last one, in nats per token, or None.
        elapsed_s: Seconds of the whole loop.
    """

    step: int
    skipped: int
    finished: bool
    validation_loss: float | None
    elapsed_s: float


class Trainer:
    """Train what was prepared.

        Trainer(prepared).run(run_directory, listener=listener, should_stop=lambda: False)

    Args:
        prepared: Model, data and settings; the model is trained in place.

    Raises:
        InputError: The warm-up is longer than the run.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.config = prepared.config
        self.total_steps = self.config.steps or self._count_steps(self.config.epochs or 0)
        self.warmup_steps = self.config.warmup_steps_of(self.total_steps)
        if self.warmup_steps > self.total_steps:
            raise InputError(
                f"--warmup-steps {self.warmup_steps:,} is more than the {count(self.total_steps, 'update')} of the "
                "run: the learning rate would never reach its peak."
            )
        self._skipped_in_a_row = 0
        self.arrangement = prepared.arrangement
        self.loss_fn = prepared.loss_fn
        self.optimizer = make_optimizer(prepared.model, self.config, prepared.machine)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        self.engine = Engine(
            prepared.model,
            self.optimizer,
            self.loss_fn,
            microbatch=self._microbatch(),
            memory=self._memory(),
            collate=prepared.collate,
            lengths=lambda samples: [len(sample["input_ids"]) for sample in samples],
            layout=self.arrangement.layout,
            cuda_graphs=self.arrangement.records,
            max_grad_norm=self.config.max_grad_norm,
            scheduler=self.scheduler,
            scaler=prepared.machine.scaler(),
        )

    def _microbatch(self) -> "int | TokenBudget | Literal['auto']":
        if self.config.token_budget is not None:
            longest = max(self.prepared.training.lengths)
            if longest > self.config.token_budget:
                raise InputError(
                    f"--token-budget {self.config.token_budget} is less than the longest sequence, which has "
                    f"{longest} tokens and is never cut: pass --token-budget {longest} or more, or a smaller "
                    "--max-length."
                )
            return TokenBudget(self.config.token_budget)
        assert self.config.microbatch is not None, "resolved() gives one of the two"
        return self.config.microbatch

    def _memory(self) -> str | int | None:
        """Give what ``auto`` may use."""
        name = "memory" if self.config.memory is not None else "gpu" if self.config.gpu is not None else None
        if name is None:
            return None
        if self.config.microbatch != "auto":
            decided = "token_budget" if self.config.token_budget is not None else "microbatch"
            raise InputError(
                f"--{name} decides about the micro-batch, and --{decided.replace('_', '-')} "
                f"{getattr(self.config, decided)} has decided: leave one of them out."
            )
        if self.config.gpu is None:
            return self.config.memory
        if self.prepared.machine.device.type != "cuda":
            raise InputError(
                f"--gpu {self.config.gpu} is about a card, and this run is on {self.prepared.machine.device}: pass "
                "--memory."
            )
        return gpu_limit(self.config.gpu)

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
        if self.config.microbatch != "auto":
            return None
        machine, model, layers = self.prepared.machine, self.prepared.model, self.arrangement.layers
        try:
            room = find_room(self.engine.memory, machine.device, [*model.parameters(), *model.buffers()])
        except ValueError as error:
            raise InputError(f"--{error}") from error
        if self.engine.memory is not None:
            machine.limit_memory(room.limit_bytes)
        key = fingerprint(self.prepared)
        if beside is not None and (found := recall(beside, key, usable_bytes=room.usable_bytes)) is not None:
            take(self.engine, layers, found.level, found.choice)
            return found.folder
        lengths = self.prepared.training.lengths
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        samples = self._samples(list({*self.first_window(), longest}))
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

    def first_window(self) -> list[int]:
        """Give the samples of the first update."""
        return self._windows(0)[0]

    def steps_per_epoch(self) -> int:
        """Count the updates of the first pass over the data."""
        return len(self._windows(0))

    def _count_steps(self, epochs: int) -> int:
        if self.config.global_batch is not None:
            return epochs * self.steps_per_epoch()
        return sum(len(self._windows(epoch)) for epoch in range(epochs))  # windows of tokens depend on the order

    def _windows(self, epoch: int) -> list[list[int]]:
        return epoch_windows(
            self.prepared.training.lengths,
            global_batch=self.config.global_batch,
            global_batch_tokens=self.config.global_batch_tokens,
            seed=self.config.seed,
            epoch=epoch,
        )

    def _lr_factor(self, step: int) -> float:
        return lr_factor(
            step, total_steps=self.total_steps, warmup_steps=self.warmup_steps, schedule=self.config.schedule
        )

    def run(
        self, directory: RunDirectory, *, listener: Listener, should_stop: Callable[[], bool] = lambda: False
    ) -> Outcome:
        """Train to the end, or until ``should_stop()`` is true after an update; then save the model.

        The seed decides about dropout too; the caller's random state is left as it was.

        Args:
            directory: Receives metrics and model.
            listener: Told of updates, validations and samples.
            should_stop: Asked after every update, and again after what was validated and written then.

        Raises:
            BigbatchError: Update after update is skipped.
        """
        started_s = time.perf_counter()
        if self.engine.choice is None:
            self.tune()
        if self.engine.choice is not None:
            remember(directory.path, self.engine.choice, fingerprint(self.prepared), level=self.level)
        step, skipped, validation_loss = 0, 0, None
        with directory, self._seeded():
            for step, window in enumerate(self._all_windows(), start=1):
                row = self._update(step, window)
                skipped = self._count_skipped(row, skipped)
                listener.updated(row)
                stopping = step < self.total_steps and should_stop()
                if self._validates_after(step) and not stopping:
                    row["validation_loss"] = validation_loss = self.validate()
                directory.write_metrics(row)
                if "validation_loss" in row:
                    listener.validated(step, row["validation_loss"])
                if step in (self.total_steps // 2, self.total_steps) and not stopping:
                    listener.sampled(step, self.write(self.config.sample_prompt))
                if step < self.total_steps and (stopping or should_stop()):
                    break
            save_model(self.prepared.model, self.prepared.tokenizer, directory.model)
        return Outcome(step, skipped, step == self.total_steps, validation_loss, time.perf_counter() - started_s)

    def _update(self, step: int, window: list[int]) -> Row:
        lr = float(self.scheduler.get_last_lr()[0])
        return metrics_row(step, self.engine.step(self._samples(window)), lr=lr)

    def _validates_after(self, step: int) -> bool:
        every = self.config.validation_every_of(self.total_steps)
        return self.prepared.validation is not None and (step % every == 0 or step == self.total_steps)

    def _count_skipped(self, row: Row, skipped: int) -> int:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if row["skipped"] else 0
        if self._skipped_in_a_row == MOST_SKIPPED:
            raise BigbatchError(
                f"the last {MOST_SKIPPED} updates were skipped ({row['skipped']}), so the model does not learn any "
                "more: try a lower --lr, or another --precision."
            )
        return skipped + bool(row["skipped"])

    def _all_windows(self) -> Iterator[list[int]]:
        step, epoch = 0, 0
        while True:
            for window in self._windows(epoch):
                if step == self.total_steps:
                    return
                step += 1
                yield window
            epoch += 1

    def _samples(self, window: list[int]) -> list[dict[str, torch.Tensor]]:
        """Fetch the samples of a window, longest first: neighbours of like length waste least on padding."""
        lengths = self.prepared.training.lengths
        return [self.prepared.training[i] for i in sorted(window, key=lambda i: -lengths[i])]

    @torch.no_grad()
    def validate(self) -> float:
        """Compute the mean loss over (a fixed sample of) the held-out sequences, in nats per token."""
        held_out = self.prepared.validation
        assert held_out is not None, "asked for only where there is validation data"
        chosen = evenly_spaced(len(held_out), MAX_VALIDATION_SEQUENCES)
        chosen.sort(key=lambda i: held_out.lengths[i])
        device = self.prepared.machine.device
        total, items = 0.0, 0
        with self._evaluating() as model:
            for rows in self.engine.groups([held_out.lengths[i] for i in chosen]):
                samples = [held_out[chosen[row]] for row in rows]
                microbatch = {name: tensor.to(device) for name, tensor in self.prepared.collate(samples).items()}
                loss_sum, num_items = self.loss_fn(model, microbatch)
                total += loss_sum.item()
                items += int(num_items.item())
        return total / items

    def write(self, prompt: str) -> str:
        """Let the model go on with a text; the random state of training is left as it was."""
        with self._evaluating() as model, self._seeded(), self.prepared.machine.autocast():
            return continue_text(model, self.prepared.tokenizer, prompt, max_new_tokens=SAMPLE_TOKENS)

    @contextmanager
    def _evaluating(self) -> Iterator[Any]:
        model, layers = self.prepared.model, self.arrangement.layers
        training = model.training
        self.engine.release()
        try:
            with nullcontext() if layers is None else layers.paused():
                yield model.eval()
        finally:
            model.train(training)

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        device = self.prepared.machine.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.config.seed)
            yield


def metrics_row(step: int, report: WindowReport, *, lr: float) -> Row:
    """Make the line of metrics.jsonl for one update."""
    tokens = report.tokens or 0
    return {
        "step": step,
        "loss": report.loss,
        "items": int(report.items),
        "grad_norm": report.grad_norm,
        "lr": lr,
        "num_microbatches": report.num_microbatches,
        "tokens": tokens,
        "tokens_per_s": tokens / report.elapsed_s,
        "peak_bytes": report.peak_bytes,
        "elapsed_s": report.elapsed_s,
        "skipped": report.skipped,
    }


def evenly_spaced(length: int, most: int) -> list[int]:
    """Give at most ``most`` indices below ``length``, as far apart as they can be."""
    if length <= most:
        return list(range(length))
    return [i * length // most for i in range(most)]
