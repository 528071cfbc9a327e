"""Out of memory in mid-window: every sample counts exactly once, and the window ends as if nothing had happened."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bigbatch
from support.tiers import slow_except

EXACT = 1e-12


class Net(nn.Module):
    """Two tied tables, a checkpointed block, a batch norm and dropout on request."""

    def __init__(self, *, dropout: float = 0.0, checkpointed: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6, momentum=0.3) if norm else None
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.drop = nn.Dropout(dropout)
        self.checkpointed = checkpointed

    def block(self, hidden: Tensor) -> Tensor:
        return self.drop(self.second(torch.tanh(self.first(hidden))))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        if self.norm is not None:
            self.norm(hidden.flatten(0, 1).detach())  # keeps statistics, changes nothing
        hidden = checkpoint(self.block, hidden, use_reentrant=False) if self.checkpointed else self.block(hidden)
        return self.head(hidden)


def make(dtype: torch.dtype = torch.float64, **kind: Any) -> nn.Module:
    torch.manual_seed(0)
    return Net(**kind).to(dtype)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    tokens, labels = batch
    logits = model(tokens).flatten(0, 1)
    loss = F.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), labels.flatten(), reduction="sum"
    )
    return loss, (labels != -100).sum()


def make_batch(rows: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (rows, 5), generator=generator)
    return tokens, torch.where(torch.rand(rows, 5, generator=generator) < 0.4, -100, tokens.flip(1))


class Stack(nn.Module):
    """Two blocks, checkpointed on request: the second one's gradients are there when the first is computed again."""

    def __init__(
        self, *, tied: bool = False, dropout: float = 0.0, checkpointed: bool = False, norm: bool = False
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 6)) for _ in range(2)
        )
        self.norm = nn.BatchNorm1d(6, momentum=0.3) if norm else None
        self.head = nn.Linear(6, 11)
        if tied:
            self.head.weight = self.embedding.weight
        self.checkpointed = checkpointed

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            if self.norm is not None:
                self.norm(hidden.flatten(0, 1).detach())  # keeps statistics, changes nothing
            hidden = checkpoint(block, hidden, use_reentrant=False) if self.checkpointed else block(hidden)
        return self.head(hidden)


class Recording(torch.optim.SGD):
    """SGD that keeps the gradients of each step."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seen = model, []
        super().__init__(model.parameters(), lr=0.1)

    def step(self, closure: None = None) -> None:
        self.seen.append({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})
        super().step(closure)


def run(model: nn.Module, loss: Callable[..., Any] = loss_fn, *, microbatch: int = 3, windows: int = 1) -> Any:
    torch.manual_seed(7)
    optimizer = Recording(model)
    engine = bigbatch.Engine(model, optimizer, loss, microbatch=microbatch, check=False)
    reports = [engine.step(make_batch()) for _ in range(windows)]
    return optimizer.seen, reports


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    total = sum((found[name].double() - g.double()).square().sum() for name, g in expected.items())
    return float((total / sum(g.double().square().sum() for g in expected.values())).sqrt())


@contextmanager
def fail_at_parameter(parameter: Tensor, *at: int) -> Iterator[list[int]]:
    """Run out of memory where the gradient of a parameter is made, at these of its times."""
    calls = [0]

    def hook(_: Tensor) -> None:
        calls[0] += 1
        if calls[0] in at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")

    handle = parameter.register_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def fail_at_module(module: nn.Module, *at: int, before: bool = True) -> Iterator[list[int]]:
    """Run out of memory before a module's forward, or after it, at these of its calls; recomputation calls it too."""
    calls = [0]

    def hook(*_: Any) -> None:
        calls[0] += 1
        if calls[0] in at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")

    handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


PARAMETERS = [name for name, _ in Net().named_parameters()]
KINDS = {
    "plain": {},
    "checkpointed": {"checkpointed": True},
    "dropout": {"dropout": 0.5},
    "checkpointed dropout": {"dropout": 0.5, "checkpointed": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("name", PARAMETERS)
def test_backward_oom_counts_every_sample_once(name: str, call: int, kind: str) -> None:
    (expected,), _ = run(make(**KINDS[kind]))
    model = make(**KINDS[kind])
    with fail_at_parameter(dict(model.named_parameters())[name], call) as calls:
        (found,), (report,) = run(model)
    assert calls[0] >= call
    assert report.retries == 1
    assert report.items == (make_batch()[1] != -100).sum()
    assert difference(found, expected) <= EXACT


@pytest.mark.parametrize("name", PARAMETERS)
def test_plain_retry_would_count_samples_twice(name: str) -> None:
    """The same failure, tried again without looking at what was added: the bound above must notice."""
    model, batch = make(), make_batch()
    (expected,), _ = run(make())
    with fail_at_parameter(dict(model.named_parameters())[name], 2):
        for rows in (0, 3, 6):
            part = tuple(tensor[rows : rows + 3] for tensor in batch)
            for _ in range(2):
                try:
                    loss_fn(model, part)[0].backward()
                    break
                except torch.OutOfMemoryError:
                    pass
    items = (batch[1] != -100).sum()
    found = {name: p.grad / items for name, p in model.named_parameters()}
    last = PARAMETERS.index(name) == len(PARAMETERS) - 1
    assert difference(found, expected) > 1e-3 or last or name == "second.bias"


@pytest.mark.parametrize("fits", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_microbatches_that_never_fit_are_halved(fits: int, dtype: torch.dtype) -> None:
    def narrow(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if len(batch[0]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss_fn(model, batch)

    (expected,), _ = run(make(dtype))
    (found,), (report,) = run(make(dtype), narrow, microbatch=9)
    assert difference(found, expected) <= (EXACT if dtype == torch.float64 else 1e-2)
    assert report.num_microbatches >= 9 / fits
    assert report.retries >= 2


def test_failures_inside_pieces_are_exact() -> None:
    (expected,), _ = run(make())
    model = make()
    with fail_at_parameter(model.first.weight, 1, 2, 3):
        (found,), (report,) = run(model, microbatch=9)
    assert (report.retries, report.num_microbatches) == (3, 3)  # whole, whole again, the first half in two, the second
    assert difference(found, expected) <= EXACT


MODULES = ["", *(name for name, module in Stack(norm=True).named_modules() if name and name != "blocks")]
STACKS: dict[str, dict[str, Any]] = {
    f"{'checkpointed ' * checkpointed}{'dropout ' * bool(dropout)}{'tied' if tied else 'untied'}": {
        "checkpointed": checkpointed,
        "dropout": dropout,
        "tied": tied,
    }
    for checkpointed in (False, True)
    for dropout in (0.0, 0.5)
    for tied in (False, True)
}


def make_stack(**kind: Any) -> nn.Module:
    torch.manual_seed(0)
    return Stack(norm=True, **kind).double()


@cache
def undisturbed(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model after a window in which nothing fails, and the gradients of the window."""
    model = make_stack(**STACKS[kind])
    (gradients,), _ = run(model)
    return model, gradients


@cache
def num_calls(name: str, kind: str) -> int:
    """Of one module in an undisturbed window, what a checkpoint computes again included."""
    model = make_stack(**STACKS[kind])
    with fail_at_module(model.get_submodule(name)) as calls:
        run(model)
    return calls[0]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("kind", slow_except(STACKS, "untied", "checkpointed dropout tied"))
@pytest.mark.parametrize("name", MODULES)
def test_forward_oom_counts_every_sample_once(name: str, kind: str, before: bool) -> None:
    """At each of its calls, those of a recomputation within backward included."""
    reference, expected = undisturbed(kind)
    total = num_calls(name, kind)
    recomputed = STACKS[kind]["checkpointed"] and name.startswith("blocks.")
    assert total == {"norm": 6}.get(name, 6 if recomputed else 3)
    for call in range(1, total + 1):
        model = make_stack(**STACKS[kind])
        with fail_at_module(model.get_submodule(name), call, before=before) as calls:
            (found,), (report,) = run(model)
        failed = int(calls[0] >= call)
        assert report.retries == failed
        # The last module of a block is not left again: recomputation stops when it has what backward asked for.
        assert failed or (not before and recomputed and calls[0] == 3)
        assert report.items == (make_batch()[1] != -100).sum()
        assert report.num_microbatches == 3
        assert difference(found, expected) <= EXACT, call
        assert all(torch.equal(buffer, model.get_buffer(key)) for key, buffer in reference.named_buffers()), call


@pytest.mark.parametrize("then", [1, 2], ids=["next call", "the one after"])
@pytest.mark.parametrize("kind", slow_except([kind for kind in STACKS if "dropout" not in kind], "checkpointed tied"))
@pytest.mark.parametrize("name", MODULES)
def test_second_forward_oom_halves_and_stays_exact(name: str, kind: str, then: int) -> None:
    """Halves draw other dropout masks, so there is none here."""
    _, expected = undisturbed(kind)
    halved = 0
    for call in range(1, num_calls(name, kind) + 1):
        model = make_stack(**STACKS[kind])
        with fail_at_module(model.get_submodule(name), call, call + then):
            (found,), (report,) = run(model)
        assert report.retries == 2 or call + then > num_calls(name, kind)
        halved += report.num_microbatches > 3
        assert difference(found, expected) <= EXACT, call
    assert halved or then == 2


@pytest.mark.parametrize("kind", [kind for kind in STACKS if "dropout" not in kind])
@pytest.mark.parametrize("name", MODULES)
def test_oom_down_to_one_sample_stays_exact(name: str, kind: str) -> None:
    """Four failures in succession, in forwards and in what a checkpoint computes again."""
    _, expected = undisturbed(kind)
    for first in (1, 2, 3):
        model = make_stack(**STACKS[kind])
        with fail_at_module(model.get_submodule(name), *range(first, first + 3)):
            (found,), (report,) = run(model, microbatch=9)
        if first == 1:
            assert (report.retries, report.num_microbatches) == (3, 3)
        assert difference(found, expected) <= EXACT


def test_plain_recomputation_retry_would_count_samples_twice() -> None:
    """The head and the second block have had their share when the first block is computed again."""
    model, batch = make_stack(checkpointed=True), make_batch()
    (expected,), _ = run(make_stack())
    with fail_at_module(model.blocks[0], 2) as calls:
        for rows in (0, 3, 6):
            part = tuple(tensor[rows : rows + 3] for tensor in batch)
            try:
                loss_fn(model, part)[0].backward()
            except torch.OutOfMemoryError:
                loss_fn(model, part)[0].backward()
    assert calls[0] == 8
    items = (batch[1] != -100).sum()
    found = {name: p.grad / items for name, p in model.named_parameters() if p.grad is not None}
    assert difference(found, expected) > 1e-3


class Reentrant(Net):
    """Its checkpoint hides what it holds from backward."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, self.embedding(tokens), use_reentrant=True))


def make_reentrant() -> nn.Module:
    torch.manual_seed(0)
    return Reentrant().double()


@pytest.mark.parametrize("at", [(1,), (2,), (3,), (1, 2), (2, 3), (3, 4)])
def test_oom_before_reentrant_backward_is_retried(at: tuple[int, ...]) -> None:
    (expected,), _ = run(make_reentrant())
    model = make_reentrant()
    with fail_at_module(model.head, *at):
        (found,), (report,) = run(model)
    assert report.retries == len(at)
    assert difference(found, expected) <= EXACT


@pytest.mark.parametrize("call", [2, 4, 6])
def test_oom_inside_reentrant_backward_passes_through(call: int) -> None:
    model = make_reentrant()
    with fail_at_module(model.first, call), pytest.raises(torch.OutOfMemoryError):
        run(model)
    assert all(p.grad is None for p in model.parameters())


def test_buffers_are_restored_after_failed_attempt() -> None:
    undisturbed, model = make(norm=True), make(norm=True)
    run(undisturbed, windows=2)
    with fail_at_parameter(model.first.weight, 5):
        _, reports = run(model, windows=2)
    assert [report.retries for report in reports] == [0, 1]
    for name, buffer in undisturbed.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name


def test_next_windows_shrink_and_grow_microbatches() -> None:
    model = make()
    engine = bigbatch.Engine(model, Recording(model), loss_fn, microbatch=9, check=False)
    with fail_at_parameter(model.first.weight, 1):
        sizes = [engine.step(make_batch()).num_microbatches]
    sizes += [engine.step(make_batch()).num_microbatches for _ in range(25)]
    assert sizes[0] == 1
    assert sizes[1:20] == [2] * 19
    assert sizes[-1] == 1


def test_oversized_sample_is_one_sentence_without_side_effects() -> None:
    def never(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")

    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(
        bigbatch.MemoryLimitError, match=r"^sample 0 of the batch does not fit in memory by itself \(CUDA"
    ):
        run(model, never)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_oversized_sample_is_named_with_its_length() -> None:
    def limited(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
        if 2 in batch[0][:, 0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")
        return loss_fn(model, batch)

    model, (tokens, labels) = make(), make_batch(4)
    tokens[:, 0] = torch.arange(4)
    engine = bigbatch.Engine(
        model,
        Recording(model),
        limited,
        microbatch=bigbatch.TokenBudget(8192),
        lengths=lambda _: [5, 40, 2048, 7],
        check=False,
    )
    with pytest.raises(bigbatch.MemoryLimitError) as raised:
        engine.step((tokens, labels))
    assert str(raised.value) == (
        "sample 2 of the batch, 2,048 tokens long, does not fit in memory by itself (CUDA out of memory. Tried to "
        "allocate 2.00 GiB). Shorten it, or use activation checkpointing, lower-precision weights or fewer trained "
        "parameters."
    )


def test_other_errors_pass_through_with_gradients_cleared() -> None:
    calls = []

    def broken(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("shapes do not match")
        return loss_fn(model, batch)

    model = make()
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        run(model, broken)
    assert len(calls) == 2
    assert all(p.grad is None for p in model.parameters())


def test_several_terms_are_retried() -> None:
    def two(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        logits = model(batch[0])
        loss, items = loss_fn(model, batch)
        return {"class": (loss, items), "size": (logits.square().sum(), logits.numel())}

    def count_items(batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        return {"class": (batch[1] != -100).sum(), "size": batch[0].numel() * 11}

    found = []
    for fail in (99, 2):
        model = make()
        optimizer = Recording(model)
        engine = bigbatch.Engine(model, optimizer, two, microbatch=4, count_items=count_items, check=False)
        with fail_at_parameter(model.second.weight, fail):
            report = engine.step(make_batch())
        found.append((optimizer.seen[0], report.terms))
    assert difference(found[1][0], found[0][0]) <= EXACT
    assert found[0][1] == found[1][1] or all(
        a.loss == pytest.approx(b.loss, rel=EXACT)
        for a, b in zip(found[0][1].values(), found[1][1].values(), strict=True)
    )
