"""Evaluation between two updates: validation losses."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from bigbatch.coupled.coupled import Coupled
from bigbatch.engine.engine import Engine
from bigbatch.lm.data.dataset import TokenDataset
from bigbatch.lm.training.callbacks import MetricsRow, perplexity
from bigbatch.lm.training.coupled_validation import coupled_validation_loss
from bigbatch.lm.training.setup import TrainingSetup
from bigbatch.rng import random_states, seed_everything, seed_of, set_random_states

MAX_VALIDATION_SEQUENCES = 128  # evenly spaced over the validation set: enough to see progress, a second on two cores
PREFIX = "validation_"  # of the fields of a validation in metrics.jsonl


def evaluate(setup: TrainingSetup, engine: Engine) -> MetricsRow:
    """Compute the loss and the perplexity of every validation set, as metrics.jsonl has them. Collective.

        validation_loss, validation_perplexity              of the set that decides
        validation_loss/NAME, validation_perplexity/NAME    of every named set

    For another objective than sft, the loss and its metrics; with a loss of the user's own, no perplexity.

    Args:
        setup: With validation data.
        engine: As for `validation_loss`.
    """
    if setup.model_setup.metrics is not None:
        loss = validation_loss(setup, engine)
        means = setup.model_setup.metrics.means(engine.sync)
        return {"validation_loss": loss, **{f"validation_{name}": value for name, value in means.items()}}
    losses = {name: validation_loss(setup, engine, data) for name, data in setup.validation_sets.items()}
    primary = next((losses[name] for name, data in setup.validation_sets.items() if data is setup.validation), None)
    losses = {"": validation_loss(setup, engine) if primary is None else primary} | {
        f"/{name}": loss for name, loss in losses.items()
    }
    row: MetricsRow = {}
    for ending, loss in losses.items():
        row[f"validation_loss{ending}"] = loss
        if setup.has_perplexity:
            row[f"validation_perplexity{ending}"] = perplexity(loss)
    return row


def validation_metrics(row: MetricsRow) -> dict[str, float]:
    """Return the metrics of a validation of pairs, such as ``accuracy``, from the row that `evaluate` is added to."""
    return {
        name.removeprefix(PREFIX): value
        for name, value in row.items()
        if name.startswith(PREFIX) and not name.startswith((f"{PREFIX}loss", f"{PREFIX}perplexity"))
    }


@torch.no_grad()
def validation_loss(setup: TrainingSetup, engine: Engine, held_out: TokenDataset | None = None) -> float:
    """Compute the mean loss over a fixed sample of a validation set, in the unit of the loss. Collective.

    The metrics of the loss are those of the validation set afterwards.

    Args:
        setup: With validation data.
        engine: Limits the micro-batches; its CUDA graphs are released.
        held_out: The set; None for that of the setup.
    """
    data = setup.validation if held_out is None else held_out
    assert data is not None, "called only with validation data"
    chosen = evenly_spaced(len(data), MAX_VALIDATION_SEQUENCES)
    chosen.sort(key=lambda i: int(data.lengths[i]))
    device = setup.device_spec.device
    total, items = 0.0, 0.0
    sync, metrics = engine.sync, setup.model_setup.metrics
    if metrics is not None:
        metrics.clear()
    if isinstance(setup.loss_fn, Coupled):
        with evaluating(setup, engine) as model:
            return coupled_validation_loss(setup, engine, setup.loss_fn, model, chosen)
    with evaluating(setup, engine) as model:
        own = chosen[sync.rank :: sync.size]  # micro-batches may have another size on each rank
        cut = engine.groups([int(data.lengths[i]) for i in own]) if own else []
        groups = [[own[row] for row in rows] for rows in cut]
        num_own, num_everywhere = len(groups), len(groups)
        if sync.runs_in_lockstep:
            num_everywhere = int(max(number for (number,) in sync.all_gather([float(num_own)])))
        for place in range(num_everywhere):
            rows = groups[place] if place < num_own else chosen[:1]
            samples = data.take(rows)
            microbatch = {name: tensor.to(device) for name, tensor in setup.collate(samples).items()}
            loss_sum, num_items = setup.loss_fn(model, microbatch)
            if place < num_own:
                total += loss_sum.item()
                items += num_items.item()
            elif metrics is not None:
                metrics.discard_last()
    if sync.size > 1:
        total, items = (sum(column) for column in zip(*sync.all_gather([total, items]), strict=True))
    return total / items


@torch.no_grad()
def losses_by_sequence(setup: TrainingSetup, engine: Engine) -> list[tuple[float, float]]:
    """Compute the sum of the loss and the items of each sequence of `validation_loss`, on one process.

    One sequence at a time, so that the difference of two models can be compared with its spread over sequences.
    """
    held_out = setup.validation
    assert held_out is not None, "called only with validation data"
    device = setup.device_spec.device
    losses = []
    with evaluating(setup, engine) as model:
        for i in evenly_spaced(len(held_out), MAX_VALIDATION_SEQUENCES):
            microbatch = {name: tensor.to(device) for name, tensor in setup.collate([held_out[i]]).items()}
            loss_sum, num_items = setup.loss_fn(model, microbatch)
            losses.append((loss_sum.item(), num_items.item()))
    return losses


@contextmanager
def evaluating(setup: TrainingSetup, engine: Engine) -> Iterator[Any]:
    """Yield the model in evaluation mode, with layers that are not compiled."""
    model, layers = setup.model, setup.model_setup.layers
    training = model.training
    engine.release_cuda_graphs()
    try:
        with nullcontext() if layers is None else layers.eager():
            yield model.eval()
    finally:
        model.train(training)


@contextmanager
def seeded(setup: TrainingSetup, *, rank: int = 0) -> Iterator[None]:
    """Seed all generators with the run's seed and the rank; restore the random state at the end."""
    devices = [setup.device_spec.device]
    before = random_states(devices)
    seed_everything(seed_of(setup.config.seed, rank))
    try:
        yield
    finally:
        set_random_states(before, devices)


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Use deterministic torch algorithms, if enabled here or before; restore the setting at the end."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def evenly_spaced(length: int, most: int) -> list[int]:
    """Return at most ``most`` indices below ``length``, evenly spaced."""
    if length <= most:
        return list(range(length))
    return [i * length // most for i in range(most)]
