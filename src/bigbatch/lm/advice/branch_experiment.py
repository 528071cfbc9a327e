"""Measurement of the largest batch without loss penalty: short branches from a checkpoint, each at another batch.

checkpoint → for each multiple k: its state, lr·√k and β2^k, the same samples in updates of k batches → validation loss

Source: Merrill et al., "Critical Batch Size Revisited", 2025.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bigbatch.errors import InputError
from bigbatch.lm.checkpoint.manager import RunCheckpoint
from bigbatch.lm.data.sampling_order import epoch_order
from bigbatch.lm.training.engine_factory import make_training_engine
from bigbatch.lm.training.evaluation import validation_loss
from bigbatch.lm.training.trainer import Trainer
from bigbatch.scaling.hyperparameters import rescale

MULTIPLES = (1, 2, 4, 8)
TOLERANCE = 0.01  # nats per token; smaller differences count as equal


@dataclass(frozen=True)
class BranchResult:
    """Result of one branch.

    Attributes:
        multiple: Batch of the branch / batch of the run.
        batch: Sequences per update.
        updates: Updates of the branch.
        loss: Validation loss in nats per token.
        penalty: Loss minus the loss at the batch of the run.
    """

    multiple: int
    batch: int
    updates: int
    loss: float
    penalty: float


def branch_experiment(trainer: Trainer, checkpoint: RunCheckpoint, *, updates: int) -> Iterator[BranchResult]:
    """Train the branches on the same samples, one after the other; the run directory is not changed.

    Args:
        trainer: Trainer of the run, created with ``checkpoint``.
        checkpoint: Checkpoint at which the branches begin.
        updates: Updates of the branch with the largest batch; the others use as many samples.

    Raises:
        InputError: The run has no validation set, or counts its batch in tokens.
    """
    if trainer.setup.validation is None:
        raise InputError(
            "--branch compares validation losses, and this run has no validation set. Train with --validation-fraction."
        )
    batch = trainer.schedule.batch_after(checkpoint.progress.cursor)
    if batch is None:
        raise InputError(
            "--branch needs a batch in sequences, and this run counts its batch in tokens. Train with --global-batch."
        )
    setup, optimizer, base = trainer.setup, trainer.optimizer, math.inf
    engine = make_training_engine(setup, optimizer)  # no scheduler: the rate stays that of the checkpoint
    state = {**checkpoint.engine_of(trainer.ranks, [setup.device_spec.device]), "scheduler": None}
    for multiple in MULTIPLES:
        engine.load_state_dict(state)
        rescale(optimizer, multiple, rule="sqrt+half-life", scheduler=[])
        size = multiple * batch
        samples = _following(trainer, checkpoint.progress.cursor, updates * max(MULTIPLES) * batch)
        windows = [samples[start : start + size] for start in range(0, len(samples), size)]
        for window in windows:
            engine.step(trainer.fetch(window))
        loss = validation_loss(setup, engine)
        base = loss if multiple == 1 else base
        yield BranchResult(multiple, size, len(windows), loss, loss - base)


def largest_without_penalty(found: Sequence[BranchResult]) -> BranchResult:
    """Return the branch with the largest batch such that it and all smaller ones have no loss penalty."""
    good = found[0]
    for branch in found[1:]:
        if not branch.penalty <= TOLERANCE:
            break
        good = branch
    return good


def _following(trainer: Trainer, cursor: int, number: int) -> list[int]:
    """Return the next ``number`` samples of a run."""
    lengths = trainer.setup.training.lengths
    epoch, position = divmod(cursor, len(lengths))
    samples: list[int] = []
    while len(samples) < number:
        order = epoch_order(len(lengths), seed=trainer.config.seed, epoch=epoch)
        samples += order[position : position + number - len(samples)]
        epoch, position = epoch + 1, 0
    return samples
