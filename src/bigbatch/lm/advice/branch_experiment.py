"""Measurement of the largest batch without loss penalty: short branches from a checkpoint, each at another batch.

checkpoint → for each multiple k: its state, lr·√k and β2^k, the same samples in updates of k batches → validation loss

Source: Merrill et al., "Critical Batch Size Revisited", 2025.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from bigbatch.coupled.coupled import Coupled
from bigbatch.errors import InputError
from bigbatch.lm.checkpoint.run_checkpoint import RunCheckpoint
from bigbatch.lm.training.engine_factory import make_training_engine
from bigbatch.lm.training.evaluation import losses_by_sequence
from bigbatch.lm.training.trainer import Trainer
from bigbatch.lm.training.window_routing import run_update
from bigbatch.scaling.hyperparameters import rescale

MULTIPLES = (1, 2, 4, 8)
TOLERANCE = 0.01  # in the unit of the loss; smaller differences count as equal
Z_95 = 1.96  # standard errors of a 95 % interval

Losses = Sequence[tuple[float, float]]
Verdict = Literal["baseline", "no penalty", "penalty", "inconclusive"]


@dataclass(frozen=True)
class BranchResult:
    """Result of one branch.

    Attributes:
        multiple: Batch of the branch / batch of the run.
        batch: Sequences per update.
        updates: Updates of the branch.
        loss: Validation loss, in the unit of the objective.
        penalty: Loss minus the loss at the batch of the run.
        spread: Half the width of the 95 % interval of the penalty, over the held-out sequences; infinite for one
            sequence. It does not contain the chance in training: another seed may give another penalty.
        verdict: Whether that interval is within the tolerance, above it, or contains it.
    """

    multiple: int
    batch: int
    updates: int
    loss: float
    penalty: float
    spread: float
    verdict: Verdict


def branch_experiment(trainer: Trainer, checkpoint: RunCheckpoint, *, updates: int) -> Iterator[BranchResult]:
    """Train the branches on the same samples, one after the other; the run directory is not changed.

    Args:
        trainer: Trainer of the run, created with ``checkpoint``.
        checkpoint: Checkpoint at which the branches begin.
        updates: Updates of the branch with the largest batch; the others use as many samples.

    Raises:
        InputError: The run has no validation set, counts its batch in tokens, or compares samples with each other.
    """
    if trainer.setup.validation is None:
        raise InputError(
            "--branch compares validation losses, and this run has no validation set. Train with --validation-fraction."
        )
    if isinstance(trainer.setup.loss_fn, Coupled):
        raise InputError(
            "--branch compares the losses of single samples, and those of --objective embedding depend on the whole "
            "batch."
        )
    batch = trainer.schedule.batch_after(checkpoint.progress.cursor)
    if batch is None:
        raise InputError(
            "--branch needs a batch in sequences, and this run counts its batch in tokens. Train with --global-batch."
        )
    setup, optimizer = trainer.setup, trainer.optimizer
    base: Losses | None = None
    engine = make_training_engine(setup, optimizer)  # no scheduler: the rate stays that of the checkpoint
    state = {**checkpoint.engine_of(trainer.ranks, [setup.device_spec.device]), "scheduler": None}
    for multiple in MULTIPLES:
        engine.load_state_dict(state)
        rescale(optimizer, multiple, rule="sqrt+half-life", scheduler=[])
        size = multiple * batch
        samples = _following(trainer, checkpoint.progress.cursor, updates * max(MULTIPLES) * batch)
        windows = [samples[start : start + size] for start in range(0, len(samples), size)]
        for window in windows:
            run_update(engine, setup.model_setup, trainer.fetch(window))
        losses = losses_by_sequence(setup, engine)
        yield compare(losses, losses if base is None else base, multiple=multiple, batch=size, updates=len(windows))
        base = losses if base is None else base


def compare(losses: Losses, base: Losses, *, multiple: int, batch: int, updates: int) -> BranchResult:
    """Compare a branch with the one at the batch of the run, sequence by sequence.

        penalty = Σ d_i / Σ n_i        spread = 1.96 · √(m / (m − 1) · Σ (d_i − penalty · n_i)²) / Σ n_i

    for m sequences with n_i labels and differences d_i of the summed loss: the interval of a ratio of two sums.

    Args:
        losses: Summed loss and labels of each held-out sequence.
        base: Those of the branch at the batch of the run.
        multiple: As for `BranchResult`.
        batch: As for `BranchResult`.
        updates: As for `BranchResult`.
    """
    total = sum(items for _, items in losses)
    loss = sum(loss_sum for loss_sum, _ in losses) / total
    differences = [ours - theirs for (ours, _), (theirs, _) in zip(losses, base, strict=True)]
    penalty = sum(differences) / total
    count = len(losses)
    squares = sum((d - penalty * items) ** 2 for d, (_, items) in zip(differences, losses, strict=True))
    spread = Z_95 * math.sqrt(squares * count / (count - 1)) / total if count > 1 else math.inf
    if multiple == 1:
        return BranchResult(multiple, batch, updates, loss, 0.0, 0.0, "baseline")
    return BranchResult(multiple, batch, updates, loss, penalty, spread, _verdict(penalty, spread))


def _verdict(penalty: float, spread: float) -> Verdict:
    if not math.isfinite(penalty):
        return "penalty"  # the branch diverged
    if penalty + spread <= TOLERANCE:
        return "no penalty"
    return "penalty" if penalty - spread > TOLERANCE else "inconclusive"


def conclusion(found: Sequence[BranchResult], *, noun: str = "sequence", unit: str = "nats per token") -> str:
    """Return the result of the branches in one or two sentences: the largest batch without penalty, if it is known.

    Args:
        found: The branches, by batch.
        noun: What a sample of the objective is.
        unit: What its loss is measured in.
    """
    good, undecided = found[0], None
    for branch in found[1:]:
        if branch.verdict == "inconclusive":
            undecided = branch
        if branch.verdict != "no penalty":
            break
        good = branch
    if undecided is None:
        return f"largest batch without loss penalty: {good.batch:,} {noun}s{' or more' if good is found[-1] else ''}"
    known = "" if good is found[0] else f"no loss penalty up to {good.batch:,} {noun}s; "
    spread = (
        f"±{undecided.spread:.4f} over the held-out {noun}s" if math.isfinite(undecided.spread) else f"of one {noun}"
    )
    return (
        f"{known}inconclusive at {undecided.batch:,}: the difference {undecided.penalty:+.4f} from the batch of "
        f"{found[0].batch:,} is within the spread {spread}, so it may be above or below {TOLERANCE} {unit}. Train "
        "with a larger --validation-fraction, or pass more --branch-updates."
    )


def _following(trainer: Trainer, cursor: int, number: int) -> list[int]:
    """Return the next ``number`` samples of a run."""
    return trainer.schedule.first_samples(number, cursor=cursor)
