"""Short branches from a checkpoint, each at another batch: the largest batch that costs no loss, measured.

checkpoint → for each multiple k: its state, lr·√k and β2^k, the same samples in updates of k batches → held-out loss

Source: Merrill et al., "Critical Batch Size Revisited", 2025, who branch a run to find how far its batch may grow.
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
TOLERANCE = 0.01  # nats a token: below it, a loss counts as the same


@dataclass(frozen=True)
class BranchResult:
    """What one branch came to.

    Attributes:
        multiple: Of the batch of the run.
        batch: Sequences.
        updates: That it made.
        loss: On the held-out sequences, in nats per token.
        penalty: What that is more than at the batch of the run.
    """

    multiple: int
    batch: int
    updates: int
    loss: float
    penalty: float


def branch_experiment(trainer: Trainer, checkpoint: RunCheckpoint, *, updates: int) -> Iterator[BranchResult]:
    """Train each branch over the same samples, one after the other; nothing is written, and the run stays as it is.

    Args:
        trainer: Of the run, made with what was saved.
        checkpoint: Its checkpoint.
        updates: Of the branch with the largest batch; the others take as many samples.

    Raises:
        InputError: The run has no held-out sequences, or counts its batch in tokens.
    """
    if trainer.setup.validation is None:
        raise InputError("--branch compares losses on held-out sequences, and this run keeps none apart.")
    batch = trainer.schedule.batch_after(checkpoint.progress.cursor)
    if batch is None:
        raise InputError("--branch needs a batch in sequences, and this run counts its batch in tokens.")
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
    """Give the branch with the largest batch whose loss, and that of all smaller ones, is that of the run's own."""
    good = found[0]
    for branch in found[1:]:
        if not branch.penalty <= TOLERANCE:
            break
        good = branch
    return good


def _following(trainer: Trainer, cursor: int, number: int) -> list[int]:
    """Give the samples that a run takes next."""
    lengths = trainer.setup.training.lengths
    epoch, position = divmod(cursor, len(lengths))
    samples: list[int] = []
    while len(samples) < number:
        order = epoch_order(len(lengths), seed=trainer.config.seed, epoch=epoch)
        samples += order[position : position + number - len(samples)]
        epoch, position = epoch + 1, 0
    return samples
