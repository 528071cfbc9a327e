"""The training loop: windows of samples → `bigbatch.Engine` → metrics, validation, samples of text, the saved model.

Counts, schedule and metrics go by updates. Nothing here prints: a `Listener` is told what happened.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bigbatch.engine import Engine
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

Row = dict[str, Any]


class Listener(Protocol):
    """Whom a run tells what happens."""

    def updated(self, row: Row) -> None:
        """Hear of one update: a line of metrics.jsonl."""

    def validated(self, step: int, loss: float) -> None:
        """Hear of a validation: the mean loss in nats per token."""

    def sampled(self, step: int, text: str) -> None:
        """Hear what the model writes by now."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: Updates done.
        finished: Whether that is all; False if it was told to stop.
        validation_loss: The last one, in nats per token, or None.
        elapsed_s: Seconds of the whole loop.
    """

    step: int
    finished: bool
    validation_loss: float | None
    elapsed_s: float


class Trainer:
    """Train what was prepared.

        Trainer(prepared).run(run_directory, listener=listener, should_stop=lambda: False)

    Args:
        prepared: Model, data and settings; the model is trained in place.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.config = prepared.config
        self.total_steps = self.config.steps or self._count_steps(self.config.epochs or 0)
        self.warmup_steps = self.config.warmup_steps_of(self.total_steps)
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
        return sum(len(self._windows(epoch)) for epoch in range(epochs))

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

        Args:
            directory: Receives metrics and model.
            listener: Told of updates, validations and samples.
            should_stop: Asked after every update.
        """
        started_s = time.perf_counter()
        step, validation_loss = 0, None
        every = self.config.validation_every_of(self.total_steps)
        with directory:
            for step, window in enumerate(self._all_windows(), start=1):
                lr = float(self.scheduler.get_last_lr()[0])
                report = self.engine.step(self._samples(window))
                row = metrics_row(step, report, lr=lr)
                stopping = step < self.total_steps and should_stop()
                if self.prepared.validation is not None and (step % every == 0 or step == self.total_steps):
                    row["validation_loss"] = validation_loss = self.validate()
                directory.write_metrics(row)
                self._tell(listener, step, row, sample=step in (self.total_steps // 2, self.total_steps))
                if stopping:
                    break
            save_model(self.prepared.model, self.prepared.tokenizer, directory.model)
        return Outcome(step, step == self.total_steps, validation_loss, time.perf_counter() - started_s)

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

    def _tell(self, listener: Listener, step: int, row: Row, *, sample: bool) -> None:
        listener.updated(row)
        if "validation_loss" in row:
            listener.validated(step, row["validation_loss"])
        if sample:
            listener.sampled(step, self.write(self.config.sample_prompt))

    @torch.no_grad()
    def validate(self) -> float:
        """Compute the mean loss over (a fixed sample of) the held-out sequences, in nats per token."""
        held_out = self.prepared.validation
        assert held_out is not None, "asked for only where there is validation data"
        chosen = evenly_spaced(len(held_out), MAX_VALIDATION_SEQUENCES)
        chosen.sort(key=lambda i: held_out.lengths[i])
        model, device = self.prepared.model.eval(), self.prepared.machine.device
        total, items = 0.0, 0
        for start in range(0, len(chosen), self.config.microbatch):
            samples = [held_out[i] for i in chosen[start : start + self.config.microbatch]]
            microbatch = {name: tensor.to(device) for name, tensor in self.prepared.collate(samples).items()}
            loss_sum, count = self.loss_fn(model, microbatch)
            total += loss_sum.item()
            items += int(count.item())
        model.train()
        return total / items

    @torch.no_grad()
    def write(self, prompt: str) -> str:
        """Let the model go on with a text; the random state of training is left as it was."""
        tokenizer, model = self.prepared.tokenizer, self.prepared.model.eval()
        device = self.prepared.machine.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.config.seed)
            with self.prepared.machine.autocast():
                text = continue_text(model, tokenizer, prompt, max_new_tokens=SAMPLE_TOKENS)
        model.train()
        return text


def continue_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    streamer: Any = None,
) -> str:
    """Write on from a prompt.

    Args:
        model: A transformers causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: The text to go on from; may be empty where the tokenizer has a token to begin with.
        max_new_tokens: Tokens to write at most.
        temperature: 0 takes the likeliest token; higher is freer.
        top_k: Choose among that many likeliest tokens; 0 among all.
        streamer: A transformers streamer that is given the tokens as they come.

    Returns:
        The prompt and what follows it, without special tokens.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tokens = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        streamer=streamer,
        **sampling,
    )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


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
