"""The training loop: windows of samples → `bigbatch.Engine` → metrics, validation, samples of text, the saved model.

Counts, schedule and metrics go by updates. Nothing here prints: a `Listener` is told what happened.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bigbatch.engine import Engine
from bigbatch.errors import BigbatchError, InputError
from bigbatch.lm.continuation import continue_text
from bigbatch.lm.documents import count
from bigbatch.lm.loss import CausalLMLoss
from bigbatch.lm.model import save_model
from bigbatch.lm.order import epoch_windows
from bigbatch.lm.prepare import Prepared
from bigbatch.lm.rundir import RunDirectory
from bigbatch.report import WindowReport

MAX_VALIDATION_SEQUENCES = 128  # evenly spaced over the held-out ones: enough to see learning, a second on two cores
SAMPLE_TOKENS = 64
FINAL_LR_FACTOR = 0.1  # of the peak rate, at the end of the cosine
BETAS = (0.9, 0.95)
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
        self.loss_fn = CausalLMLoss(prepared.machine)
        self.optimizer = self._make_optimizer()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        self.engine = Engine(
            prepared.model,
            self.optimizer,
            self.loss_fn,
            microbatch=self.config.microbatch,
            collate=prepared.collate,
            lengths=lambda samples: [len(sample["input_ids"]) for sample in samples],
            max_grad_norm=self.config.max_grad_norm,
            scheduler=self.scheduler,
            scaler=prepared.machine.scaler(),
        )

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

    def _make_optimizer(self) -> torch.optim.AdamW:
        trained = [p for p in self.prepared.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.config.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        assert self.config.lr is not None, "resolved() gives it a value"
        fused = self.prepared.machine.device.type in ("cuda", "cpu")
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=self.config.lr, betas=BETAS, fused=fused)

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
            for start in range(0, len(chosen), self.config.microbatch):
                samples = [held_out[i] for i in chosen[start : start + self.config.microbatch]]
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
        model = self.prepared.model
        training = model.training
        try:
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


def lr_factor(step: int, *, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """Compute the learning rate of an update, as a share of the peak.

    Args:
        step: Updates done before.
        total_steps: Updates of the run.
        warmup_steps: Updates over which the rate rises linearly to the peak.
        schedule: ``cosine`` falls to a tenth at the last update; ``constant`` stays.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return FINAL_LR_FACTOR + (1 - FINAL_LR_FACTOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def evenly_spaced(length: int, most: int) -> list[int]:
    """Give at most ``most`` indices below ``length``, as far apart as they can be."""
    if length <= most:
        return list(range(length))
    return [i * length // most for i in range(most)]
