"""Trainers with small models, and the gradient that each of their updates should have had."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from support import full_batch_reference as ref

BATCH, STEPS = 4, 3
NUM_SAMPLES = 31
"""Two full windows of 12 samples, and a last one of 4 + 3."""

Samples = list[dict[str, Any]]


class MeanLoss(Trainer):
    """Overrides the loss by a mean over labels, as scripts do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = ref.loss_mean(model, inputs)
        return (loss, {"loss": loss}) if return_outputs else loss


def samples(number: int = NUM_SAMPLES, seed: int = 0) -> Samples:
    """Return samples of 1 to LENGTH tokens, some without a label."""
    batch = ref.ragged_batch(number, seed=seed)
    lengths = torch.randint(1, ref.LENGTH + 1, (number,), generator=torch.Generator().manual_seed(seed + 1)).tolist()
    return [{name: column[row][:length] for name, column in batch.items()} for row, length in enumerate(lengths)]


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pad samples to the longest."""
    pad = nn.utils.rnn.pad_sequence
    tokens = pad([row["tokens"] for row in rows], batch_first=True)
    return {"tokens": tokens, "labels": pad([row["labels"] for row in rows], True, ref.IGNORED)}


def num_labels(inputs: Any) -> int:
    """Return the number of labels that count."""
    return int((inputs["labels"] != ref.IGNORED).sum())


class Recorder(TrainerCallback):
    """Records gradient and weights before each update, and counts events."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.events: list[tuple[str, int, float | None]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        self.weights.append(copy.deepcopy(model.state_dict()))

    def on_step_begin(self, args, state, control, **_):
        self.events.append(("step_begin", state.global_step, None))

    def on_substep_end(self, args, state, control, **_):
        self.events.append(("substep_end", state.global_step, None))

    def on_step_end(self, args, state, control, **_):
        self.events.append(("step_end", state.global_step, state.epoch))

    def on_epoch_end(self, args, state, control, **_):
        self.events.append(("epoch_end", state.global_step, state.epoch))


def arguments(folder: Path, kind: type[TrainingArguments] = TrainingArguments, **settings: Any) -> TrainingArguments:
    """Return arguments of a short run on the CPU: SGD, samples in order, three micro-batches in a window."""
    defaults = {
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": STEPS,
        "num_train_epochs": 1,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }
    if kind is not TrainingArguments:
        defaults |= {"bf16": False, "gradient_checkpointing": False}
    return kind(str(folder), **{**defaults, **settings})


def make(
    folder: Path,
    kind: type[Trainer] = MeanLoss,
    model: nn.Module | None = None,
    dataset: Samples | None = None,
    collator: Callable[[Any], Any] = collate,
    callbacks: Sequence[TrainerCallback] = (),
    eval_dataset: Samples | None = None,
    **settings: Any,
) -> tuple[Any, Recorder]:
    """Return a trainer, and the recorder of its updates."""
    recorder = Recorder()
    trainer = kind(
        ref.make_model() if model is None else model,
        arguments(folder, **settings),
        data_collator=collator,
        train_dataset=samples() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        callbacks=[recorder, *callbacks],
    )
    return trainer, recorder


Loss = Callable[[nn.Module, Any], Tensor]


def errors(recorder: Recorder, model: nn.Module, windows: Sequence[Any], loss: Loss = ref.loss_mean) -> list[float]:
    """Return the error of the gradient of each update against that of its whole batch in one piece.

    Args:
        recorder: Of the updates.
        model: A model of the same kind; its weights are overwritten.
        windows: The collated samples of each update.
        loss: The mean loss of a batch.
    """
    found = []
    for gradients, weights, batch in zip(recorder.gradients, recorder.weights, windows, strict=True):
        model.load_state_dict(weights)
        model.zero_grad()
        loss(model, batch).backward()
        full = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(ref.relative_error(gradients, full))
    return found


def windows(dataset: Samples, collator: Callable[[Any], Any] = collate, size: int = BATCH * STEPS) -> list[Any]:
    """Return the samples of each update, in order and collated in one piece."""
    return [collator([dict(row) for row in dataset[start : start + size]]) for start in range(0, len(dataset), size)]
