"""Functions that ranks run in test_updates.py: several updates of different models, compared with one process."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from support import distributed_windows as cases
from support import full_batch_reference as ref


class Tied(ref.TokenModel):
    """Ties the embedding and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embedding.weight


class Frozen(ref.TokenModel):
    """Freezes the first layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding.requires_grad_(False)
        self.norm.bias.requires_grad_(False)


class Branches(ref.TokenModel):
    """Has a layer that only some micro-batches use, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.sometimes = nn.Linear(ref.VOCABULARY, ref.VOCABULARY)
        self.never = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        small = (tokens[:, :1] < 4)[..., None]
        return torch.where(small, self.sometimes(logits), logits) if small.any() else logits


class Deep(nn.Module):
    """Has more parameters than one number of the window vote can encode; each micro-batch uses some."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(60))
        self.head = nn.Linear(2, ref.VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = tokens[..., None].to(self.head.weight.dtype) / 10 * torch.ones(2, dtype=self.head.weight.dtype)
        for number in sorted({int(token) for token in tokens[:, 0]}):
            hidden = hidden + torch.tanh(self.layers[5 * number](hidden)) / 9
        return self.head(hidden)


class Normed(ref.TokenModel):
    """Keeps running statistics that do not affect the output."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(8)

    def forward(self, tokens: Tensor) -> Tensor:
        self.statistics(self.embedding(tokens).flatten(0, 1).detach())
        return super().forward(tokens)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "tokens": ref.TokenModel,
    "tied": Tied,
    "frozen": Frozen,
    "branches": Branches,
    "normed": Normed,
}


def make(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """Return a model of a kind."""
    torch.manual_seed(seed)
    return KINDS[kind]().to(dtype)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer with weight decay, which separates a zero gradient from None."""
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


@dataclass
class Trained:
    """Result of training on one rank.

    Attributes:
        error: Relative parameter error against one process.
        parameters: Full parameters.
        grad_norms: Of each update.
        expected_norms: Of each update in one process.
        buffers: By name.
    """

    error: float
    parameters: dict[str, Tensor]
    grad_norms: list[float]
    expected_norms: list[float]
    buffers: dict[str, Tensor]


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return full copies of the parameters, by name."""
    return {name: cases.full_tensor(p).detach().clone() for name, p in cases.inner(model).named_parameters()}


def train(how: str, kind: str, num_updates: int, dtype: torch.dtype = torch.float64) -> Trained:
    """Train this rank's share of each batch with an engine, and whole batches in one process."""
    model = make(kind, dtype)
    reference = make(kind, torch.float64)
    reference.load_state_dict(model.state_dict())
    if how == "plain" and dist.get_rank():
        with torch.no_grad():  # the constructor broadcasts rank 0's parameters
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.add_(1)
    spread_model, sync = cases.parallelize(model, how)
    optimizer = adam(spread_model)
    rank, size = dist.get_rank(), dist.get_world_size()
    engine = bigbatch.Engine(
        spread_model,
        optimizer,
        loss_in_float32 if dtype == torch.bfloat16 else ref.loss_and_items,
        microbatch=(2, 3, 1, 4)[rank],
        max_grad_norm=0.3,
        sync=sync,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9),
        check=False,
    )
    batches = list(ref.batches(num_updates, 11))
    shares = [cases.select_rows(batch, share(index, rank, size)) for index, batch in enumerate(batches)]
    norms = [engine.step(own).grad_norm for own in shares]
    expected = ref.train_reference(
        reference,
        adam,
        batches,
        max_grad_norm=0.3,
        make_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9),
    )
    found = parameters_of(spread_model)
    buffers = {name: buffer.clone() for name, buffer in cases.inner(spread_model).named_buffers()}
    return Trained(ref.relative_error(found, expected.parameters), found, norms, expected.grad_norms, buffers)


def share(index: int, rank: int, size: int) -> range:
    """Return a rank's rows of a batch of 11: the first rank has few, in every third batch none."""
    first = (3, 0, 1)[index % 3]
    bounds = [0, first, *(first + (11 - first) * (i + 1) // (size - 1) for i in range(size - 1))]
    return range(bounds[rank], bounds[rank + 1])


def loss_in_float32(model: nn.Module, batch: ref.Batch) -> tuple[Tensor, int]:
    """Sum the losses of narrow logits in float32."""
    logits = model(batch["tokens"]).flatten(0, 1).float()
    labels = batch["labels"].flatten()
    return F.cross_entropy(logits, labels, ignore_index=ref.IGNORED, reduction="sum"), ref.count(batch)


def narrow_sums(how: str) -> tuple[float, float, dict[str, Tensor]]:
    """Sum bfloat16 gradients of many micro-batches over ranks, compared with one process.

    Returns:
        The relative difference; that of sums in bfloat16; the gradient.
    """
    model = make("tokens", torch.bfloat16)
    alone, naive = copy.deepcopy(model), copy.deepcopy(model)
    batch = ref.ragged_batch(64)
    expected = cases.GradientRecorder(alone)
    bigbatch.Engine(alone, expected, loss_in_float32, microbatch=1).step(batch)
    for part in ref.cut(batch, 1):
        (loss_in_float32(naive, part)[0] / ref.count(batch)).backward()
    naive_error = ref.relative_error({name: p.grad for name, p in naive.named_parameters()}, expected.seen[0])
    spread_model, sync = cases.parallelize(model, how)
    optimizer = cases.GradientRecorder(spread_model)
    engine = bigbatch.Engine(spread_model, optimizer, loss_in_float32, microbatch=1, sync=sync)
    engine.step(cases.select_rows(batch, range(dist.get_rank(), 64, dist.get_world_size())))
    return ref.relative_error(optimizer.seen[0], expected.seen[0]), naive_error, optimizer.seen[0]


def scaled(how: str) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Train in float16 autocast with a scaler whose first scale overflows; ranks differ in items by a factor of 60."""
    model = make("tokens", torch.float32)
    reference = copy.deepcopy(model)
    batch = ref.ragged_batch(61, seed=3)
    rows = range(1) if dist.get_rank() == 0 else range(1, 61)
    spread_model, sync = cases.parallelize(model, how)
    optimizer = cases.GradientRecorder(spread_model, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    engine = bigbatch.Engine(spread_model, optimizer, autocast_loss, microbatch=60, scaler=scaler, sync=sync)
    reports = [engine.step(cases.select_rows(batch, rows)) for _ in range(3)]
    expected = ref.full_gradient(reference, batch)
    skipped = [float(report.skipped is not None) for report in reports]
    return skipped, [ref.relative_error(optimizer.seen[0], expected), scaler.get_scale()], parameters_of(spread_model)


def autocast_loss(model: nn.Module, batch: ref.Batch) -> tuple[Tensor, int]:
    """Compute the model in float16, and the loss in float32."""
    with torch.autocast("cpu", torch.float16):
        logits = model(batch["tokens"])
    labels = batch["labels"].flatten()
    loss_sum = F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=ref.IGNORED, reduction="sum")
    return loss_sum, ref.count(batch)


def unfreezing(how: str) -> float:
    """Train with a frozen layer, unfreeze it, and train on; return the error against one process."""
    errors = []
    model = make("tokens")
    reference = copy.deepcopy(model)
    spread_model, sync = cases.parallelize(model, how)
    optimizer, expected = adam(spread_model), adam(reference)
    engine = bigbatch.Engine(spread_model, optimizer, ref.loss_and_items, microbatch=2, sync=sync)
    for index, batch in enumerate(ref.batches(6, 8)):
        for either in (model, reference):
            either.hidden.requires_grad_(index >= 3)
        engine.step(cases.select_rows(batch, range(dist.get_rank(), 8, dist.get_world_size())))
        expected.zero_grad()
        ref.loss_mean(reference, batch).backward()
        expected.step()
        errors.append(ref.relative_error(parameters_of(spread_model), ref.parameters_of(reference)))
    return max(errors)


def deep(how: str) -> tuple[float, set[str], set[str]]:
    """Use a few of 122 parameters; return the error, and the names with a gradient here and in the reference."""
    torch.manual_seed(0)
    model = Deep().double()
    reference = copy.deepcopy(model)
    batch = ref.ragged_batch(6)
    shares = [[0, 1, 2], [3, 4, 5]]
    loss = sum(ref.loss_and_items(reference, cases.select_rows(batch, rows))[0] for rows in shares) / ref.count(batch)
    loss.backward()
    spread_model, sync = cases.parallelize(model, how)
    optimizer = PresentGradientRecorder(spread_model)
    engine = bigbatch.Engine(spread_model, optimizer, ref.loss_and_items, microbatch=3, sync=sync)
    engine.step(cases.select_rows(batch, shares[dist.get_rank()]))
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    found = {name: grad for name, grad in optimizer.found.items() if name in expected}
    return ref.relative_error(found, expected), set(optimizer.found), set(expected)


class PresentGradientRecorder(torch.optim.SGD):
    """SGD that keeps the gradients that are not None."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.0)
        self.named = dict(cases.inner(model).named_parameters())
        self.found: dict[str, Tensor] = {}

    def step(self, closure: Any = None) -> Any:
        self.found = {name: p.grad.clone() for name, p in self.named.items() if p.grad is not None}
        return super().step(closure)


def sparse(how: str) -> tuple[str, str]:
    """Train an embedding with sparse gradients; return the exception."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)).double()
    spread_model, sync = cases.parallelize(model, how)
    optimizer = torch.optim.SGD(spread_model.parameters(), lr=0.1)
    engine = bigbatch.Engine(spread_model, optimizer, lambda m, x: (m(x).sum(), len(x)), microbatch=2, sync=sync)
    try:
        engine.step(torch.arange(4))
    except Exception as error:  # noqa: BLE001 - checked by the test
        return type(error).__name__, str(error)
    return "", ""


def overlapping_accumulators(how: str, settings: dict[str, bool]) -> tuple[float, dict[str, Any], dict[str, Any]]:
    """Overlap windows of two accumulators over parts of one model; the first ends inside the second.

    Returns:
        The parameter error after both; the flags of the wrapper before and after.
    """
    model = make("tokens")
    reference = copy.deepcopy(model)
    batch = ref.ragged_batch(8)
    spread_model, sync = cases.parallelize(model, how, **settings)
    before = cases.sync_flags(spread_model)
    lower = torch.optim.SGD([*model.embedding.parameters(), *model.norm.parameters()], lr=0.0)
    upper = torch.optim.SGD([*model.hidden.parameters(), *model.head.parameters()], lr=0.1)
    first = bigbatch.Accumulator(spread_model, lower, sync=sync)
    second = bigbatch.Accumulator(spread_model, upper, sync=sync)
    own = ref.cut(cases.select_rows(batch, range(dist.get_rank(), 8, 2)), 1)
    one, two = first.window(), second.window()
    for index, part in enumerate(own):
        two.backward(ref.loss_and_items(spread_model, part))
        if index == 1:
            one.backward(ref.loss_and_items(spread_model, part))
            one.step()
    two.step()
    gradient = ref.full_gradient(reference, batch)
    rates = {"embedding": 0.0, "norm": 0.0, "hidden": 0.1, "head": 0.1}
    expected = {n: p.detach() - rates[n.partition(".")[0]] * gradient[n] for n, p in reference.named_parameters()}
    return ref.relative_error(parameters_of(spread_model), expected), before, cases.sync_flags(spread_model)
