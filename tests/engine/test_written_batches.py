"""A loss that writes to its micro-batch in place: what is run more than once starts from the first values."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigbatch
from bigbatch.errors import MemoryLimitError, WindowStateError
from support import full_batch_reference as ref

EXACT = 1e-12
WRONG = 1e-3


def make_model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def make_batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(8, size, generator=generator).to(dtype) for name, size in (("x", 5), ("y", 3))}


def loss_fn(model, batch):
    return F.mse_loss(model(batch["x"]), batch["y"], reduction="sum"), batch["y"].numel()


def writes_in_place(model, batch):
    batch["x"].mul_(2).sub_(0.5)
    return loss_fn(model, batch)


def as_written(batch):
    return {**batch, "x": batch["x"] * 2 - 0.5}


def error_of(make_engine, model, batch, expected_batch=None, loss=loss_fn):
    """Return the error of one SGD step of an engine against the full batch."""
    whole = copy.deepcopy(model)
    loss_sum, items = loss(whole, as_written(batch) if expected_batch is None else expected_batch)
    (loss_sum / items).backward()
    before = [p.detach().clone() for p in model.parameters()]
    make_engine(model, torch.optim.SGD(model.parameters(), lr=1.0)).step(copy.deepcopy(batch))
    steps = [old - p.detach() for p, old in zip(model.parameters(), before, strict=True)]
    expected = [p.grad for p in whole.parameters()]
    difference = torch.cat([(a - b).flatten() for a, b in zip(steps, expected, strict=True)]).norm()
    return (difference / torch.cat([g.flatten() for g in expected]).norm()).item()


@pytest.mark.parametrize("microbatch", ["auto", 2, 8])
def test_step_is_exact(microbatch):
    def make(model, optimizer):
        return bigbatch.Engine(model, optimizer, writes_in_place, microbatch=microbatch)

    assert error_of(make, make_model(), make_batch()) <= EXACT


def test_collated_samples_that_share_memory_are_exact():
    """A collate function that returns the tensors of a sample itself."""
    samples = [{name: column[i : i + 1] for name, column in make_batch().items()} for i in range(8)]

    def make(model, optimizer):
        return bigbatch.Engine(
            model,
            optimizer,
            lambda model, batch: writes_in_place(model, batch),
            collate=lambda some: some[0] if len(some) == 1 else {n: torch.cat([s[n] for s in some]) for n in some[0]},
        )

    assert error_of(make, make_model(), samples, as_written(make_batch())) <= EXACT


def test_tune_leaves_the_batch_alone():
    model, batch = make_model(), make_batch()
    engine = bigbatch.Engine(model, torch.optim.SGD(model.parameters(), lr=1.0), writes_in_place)
    engine.tune(batch)
    assert all(torch.equal(value, make_batch()[name]) for name, value in batch.items())


def test_reproducible_step_is_right():
    def make(model, optimizer):
        return bigbatch.Engine(model, optimizer, writes_in_place, microbatch=4, quantum=2, reproducible=True)

    assert error_of(make, make_model(torch.float32), make_batch(torch.float32)) <= 1e-5


def test_coupled_step_is_exact():
    def encode(model, batch):
        return model(batch["x"].mul_(2).sub_(0.5))

    def contrastive(_model, features):
        return -torch.log_softmax(features @ features.T, 1).diagonal().sum()

    def whole(model, batch):
        return contrastive(model, model(batch["x"])), 8

    coupled = bigbatch.Coupled(encode, contrastive)
    batch = make_batch()
    reference = error_of(
        lambda model, optimizer: bigbatch.Engine(model, optimizer, coupled, microbatch=8),
        make_model(),
        batch,
        loss=whole,
    )
    cut = error_of(
        lambda model, optimizer: bigbatch.Engine(model, optimizer, coupled, microbatch=2),
        make_model(),
        batch,
        loss=whole,
    )
    assert abs(cut - reference) <= EXACT


class Ascent(torch.optim.Optimizer):
    """Steps with the gradient at a point that is moved first."""

    def __init__(self, params, asks_late=False):
        super().__init__(list(params), {"lr": 1.0})
        self.asks_late = asks_late

    def _parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    def update(self, closure):
        moved = [0.1 * p.grad for p in self._parameters()]
        with torch.no_grad():
            torch._foreach_add_(self._parameters(), moved)
        closure()
        with torch.no_grad():
            torch._foreach_sub_(self._parameters(), moved)
            torch._foreach_sub_(self._parameters(), [p.grad for p in self._parameters()])


class Closure(Ascent):
    def step(self, closure):
        self.update(closure)


class OptionalClosure(Ascent):
    def step(self, closure=None):
        if closure is None:
            raise RuntimeError("step needs a closure")
        self.update(closure)


def test_second_run_for_a_closure_is_exact():
    results = []
    for loss, batch in ((loss_fn, as_written(make_batch())), (writes_in_place, make_batch())):
        model = make_model()
        bigbatch.Engine(model, Closure(model.parameters()), loss, microbatch=2).step(batch)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (results[0] - results[1]).abs().max().item() <= EXACT
    start = torch.cat([p.detach().flatten() for p in make_model().parameters()])
    assert (results[0] - start).abs().max().item() > WRONG


def test_second_run_that_was_not_expected_is_refused():
    model = make_model()
    engine = bigbatch.Engine(model, OptionalClosure(model.parameters()), writes_in_place, microbatch=2)
    with pytest.raises(bigbatch.errors.TornUpdateError, match="loss_fn has written to its micro-batches in place"):
        engine.step(make_batch())


def test_retry_after_out_of_memory_is_refused():
    model, calls = make_model(), []

    def fails_once(model, batch):
        calls.append(len(batch["x"]))
        result = writes_in_place(model, batch)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    engine = bigbatch.Engine(model, torch.optim.SGD(model.parameters(), lr=1.0), fails_once, microbatch=4, check=False)
    with pytest.raises(MemoryLimitError) as error:
        engine.step(make_batch())
    assert str(error.value) == (
        "memory ran out in a micro-batch of 4 samples (CUDA out of memory), which cannot be run again, because "
        "loss_fn has written to the batch in place: let it make new tensors, such as x = x / 255 in place of "
        "x.div_(255). Or pass a smaller microbatch."
    )
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), make_model().parameters(), strict=True))


def test_verify_is_exact_and_leaves_the_batch_alone():
    batch = make_batch()
    report = bigbatch.verify(make_model(), writes_in_place, batch, microbatch=[2, 4])
    assert report.exact
    assert all(torch.equal(value, make_batch()[name]) for name, value in batch.items())


def test_first_window_check_leaves_the_batch_alone():
    def mean(model, batch):
        batch["x"].mul_(2)
        return F.mse_loss(model(batch["x"]), batch["y"]) * batch["y"].numel(), batch["y"].numel()

    model, batch = make_model(), make_batch()
    bigbatch.Engine(model, torch.optim.SGD(model.parameters(), lr=1.0), mean, microbatch=4).step(batch)
    assert torch.equal(batch["x"], 2 * make_batch()["x"])  # by the window itself, once


def windows_of(loader, *, writes, **settings):
    model = make_model(torch.float32)
    accumulator = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=1.0), **settings)
    for window in accumulator.windows(loader, num_microbatches=4):
        for part in window:
            loss_sum, items = (writes_in_place if writes else loss_fn)(model, part)
            window.backward(loss_sum, items=items)
        window.step()


def test_second_pass_of_a_reproducible_window_is_refused():
    parts = ref.cut({"tokens": make_batch(torch.float32)["x"], "labels": make_batch(torch.float32)["y"]}, 2)
    parts = [{"x": part["tokens"], "y": part["labels"]} for part in parts]
    windows_of(copy.deepcopy(parts), writes=False, reproducible=True)
    with pytest.raises(WindowStateError, match="because they were written to in place: make new tensors in the loop"):
        windows_of(copy.deepcopy(parts), writes=True, reproducible=True)

    def reuses():
        buffer = copy.deepcopy(parts[0])
        for part in parts:
            for name, value in part.items():
                buffer[name].copy_(value)
            yield buffer

    with pytest.raises(WindowStateError, match="let the loader yield new ones"):
        windows_of(reuses(), writes=False, reproducible=True)
    windows_of(reuses(), writes=False)


def test_reused_tensors_are_refused_if_items_are_counted_ahead():
    batch, model = make_batch(), make_model()
    buffer = {name: column[:2].clone() for name, column in batch.items()}

    def reuses():
        for start in range(0, 8, 2):
            for name, column in batch.items():
                buffer[name].copy_(column[start : start + 2])
            yield buffer

    accumulator = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=1.0))
    windows = accumulator.windows(reuses(), num_microbatches=4, count_items=lambda part: {"mse": part["y"].numel()})
    with pytest.raises(ValueError, match=r"they would all be the last one\. Let it yield new tensors"):
        next(windows)
