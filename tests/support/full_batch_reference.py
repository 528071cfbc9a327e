"""The test oracle: the un-cut full batch in plain torch, on ragged masked data and small models."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch

IGNORED = -100
VOCABULARY = 11
LENGTH = 6

Batch = dict[str, Tensor]


class TokenModel(nn.Module):
    """Predicts a label for each token; has biases, a norm and a non-linearity, and no operation across samples."""

    def __init__(self, width: int = 8, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.norm(self.embedding(tokens)))))


def make_model(seed: int = 0, dtype: torch.dtype = torch.float64) -> TokenModel:
    torch.manual_seed(seed)
    return TokenModel().to(dtype)


def ragged_batch(num_samples: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Batch:
    """Return samples with 0 to LENGTH labels each; the other positions are ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (num_samples, LENGTH), generator=generator)
    labels = torch.randint(vocabulary, (num_samples, LENGTH), generator=generator)
    lengths = torch.randint(0, LENGTH + 1, (num_samples, 1), generator=generator)
    lengths[0], lengths[-1] = LENGTH, 1  # ragged, whatever the seed
    return {"tokens": tokens, "labels": labels.masked_fill(torch.arange(LENGTH) >= lengths, IGNORED)}


def num_samples(batch: Batch) -> int:
    return len(batch["tokens"])


def cut(batch: Batch, sizes: int | Sequence[int]) -> list[Batch]:
    """Split a batch into micro-batches of one size (the last may be smaller) or of the given sizes."""
    total = num_samples(batch)
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    columns = {name: torch.split(column, list(sizes)) for name, column in batch.items()}
    return [{name: column[index] for name, column in columns.items()} for index in range(len(sizes))]


def loss_mean(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


def count(batch: Batch) -> int:
    return int((batch["labels"] != IGNORED).sum())


def loss_and_items(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Return the summed loss and the number of items: the loss function of a user."""
    logits = model(batch["tokens"]).flatten(0, 1)
    return F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"), count(batch)


def mean_times_items(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Return the same sum as masked mean × items: 0/0 without items, with NaN in every gradient."""
    labels = batch["labels"].flatten()
    logits = model(batch["tokens"]).flatten(0, 1)
    mask = (labels != IGNORED).to(logits.dtype)
    losses = -logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return (losses * mask).sum() / mask.sum() * count(batch), count(batch)


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def full_gradient(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return gradients_of(model, loss_mean(model, batch))


def mean_of_means_gradient(model: nn.Module, microbatches: Iterable[Batch]) -> dict[str, Tensor]:
    """Return the gradient of the mean of micro-batch means, over the micro-batches with items."""
    losses = [loss_mean(model, part) for part in microbatches if count(part)]
    return gradients_of(model, torch.stack(losses).mean())


def relative_error(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    assert found.keys() == reference.keys()
    difference = sum(float((found[name].double() - reference[name].double()).square().sum()) for name in reference)
    size = sum(float(tensor.double().square().sum()) for tensor in reference.values())
    return (difference / size) ** 0.5


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class RecordingSGD(torch.optim.SGD):
    """SGD that keeps the gradients of each step."""

    def __init__(self, model: nn.Module, lr: float = 0.0, **settings: Any) -> None:
        super().__init__(model.parameters(), lr=lr, **settings)
        self.names = {p: name for name, p in model.named_parameters()}
        self.recorded: list[dict[str, Tensor]] = []

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        self.recorded.append(
            {
                self.names[p]: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
                for group in self.param_groups
                for p in group["params"]
                if p.requires_grad
            }
        )
        return super().step(closure)


LossFunction = Callable[[nn.Module, Any], Any]


def step_by_accumulator(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    size: int,
    *,
    loss_fn: LossFunction = loss_and_items,
    **settings: Any,
) -> bigbatch.WindowReport:
    accumulator = bigbatch.Accumulator(model, optimizer, **settings)
    parts = cut(batch, size)
    (report,) = run_windows(accumulator, parts, num_microbatches=len(parts), loss_fn=loss_fn)
    return report


def step_by_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    size: int,
    *,
    loss_fn: LossFunction = loss_and_items,
    **settings: Any,
) -> bigbatch.WindowReport:
    return bigbatch.Engine(model, optimizer, loss_fn, microbatch=size, **settings).step(batch)


STEPPERS = {"Accumulator": step_by_accumulator, "Engine": step_by_engine}


def run_windows(
    accumulator: bigbatch.Accumulator,
    microbatches: Iterable[Any],
    *,
    num_microbatches: int,
    loss_fn: LossFunction = loss_and_items,
    **settings: Any,
) -> list[bigbatch.WindowReport]:
    """Run one epoch of a user's loop and return the reports."""
    reports = []
    for window in accumulator.windows(microbatches, num_microbatches=num_microbatches, **settings):
        for microbatch in window:
            window.backward(loss_fn(accumulator.model, microbatch))
        reports.append(window.step())
    return reports


@dataclass
class Trained:
    """Parameters after some reference updates, and the norm before clipping of each."""

    parameters: dict[str, Tensor]
    grad_norms: list[float]


def train_reference(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    batches: Iterable[Batch],
    *,
    max_grad_norm: float | None = None,
    make_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    loss: LossFunction = loss_mean,
) -> Trained:
    """Train a copy of the model on full batches in plain torch."""
    model = copy.deepcopy(model)
    optimizer = make_optimizer(model)
    scheduler = None if make_scheduler is None else make_scheduler(optimizer)
    grad_norms = []
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch).backward()
        limit = float("inf") if max_grad_norm is None else max_grad_norm
        dense = [p for p in model.parameters() if p.grad is not None and not p.grad.is_sparse]
        grad_norms.append(float(torch.nn.utils.clip_grad_norm_(dense, limit)))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return Trained(parameters_of(model), grad_norms)


def train_mean_of_means(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    batches: Iterable[Batch],
    size: int,
    *,
    loss: LossFunction = loss_mean,
) -> dict[str, Tensor]:
    """Train a copy of the model on the mean of micro-batch means, to show that the data reveals the error."""
    model = copy.deepcopy(model)
    optimizer = make_optimizer(model)
    for batch in batches:
        optimizer.zero_grad()
        parts = [part for part in cut(batch, size) if count(part)]
        for part in parts:
            (loss(model, part) / len(parts)).backward()
        optimizer.step()
    return parameters_of(model)


def batches(number: int, samples: int = 9) -> Iterator[Batch]:
    return (ragged_batch(samples, seed=100 + index) for index in range(number))


def hooks_of(model: nn.Module) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
