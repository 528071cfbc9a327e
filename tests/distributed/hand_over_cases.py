"""Functions that ranks run in test_hand_over.py: finished gradients, and losses that call collectives."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import bigbatch
from bigbatch.errors import ShardedMemoryError, first_line
from support import distributed_windows as cases
from support import full_batch_reference as ref


def rows_of(rank: int, sizes: Sequence[int]) -> list[int]:
    """Return this rank's part of the global batch."""
    return list(range(sum(sizes[:rank]), sum(sizes[: rank + 1])))


def make_engine(how: str, loss_fn: ref.LossFunction = ref.loss_and_items, **settings: Any) -> bigbatch.Engine:
    """Return an engine without an optimizer over a model that is distributed in some way."""
    kind, _, option = how.partition(" ")
    model, sync = cases.parallelize(ref.make_model(), kind, **({option: True} if option else {}))
    return bigbatch.Engine(model, None, loss_fn, **{"microbatch": 2, "sync": sync, "check": False, **settings})


def gradients_of(engine: bigbatch.Engine) -> dict[str, Tensor]:
    """Return full copies of the gradients."""
    return {name: cases.full_tensor(p.grad).clone() for name, p in engine.sync.module.named_parameters()}


def reference_of(sizes: Sequence[int]) -> tuple[ref.Batch, dict[str, Tensor]]:
    """Return the global batch and its gradient in one process."""
    batch = ref.ragged_batch(sum(sizes))
    return batch, ref.full_gradient(ref.make_model(), batch)


def delivered(how: str, sizes: Sequence[int]) -> tuple[float, float, float, int]:
    """Deliver twice, then finish; return the errors of both and of the loss, and large collectives while delivering."""
    batch, full = reference_of(sizes)
    engine = make_engine(how)
    own = cases.select_rows(batch, rows_of(dist.get_rank(), sizes))
    first, second = engine.loss(own), engine.loss(own)
    loss_error = abs(first.item() / ref.loss_mean(ref.make_model(), batch).item() - 1)
    with cases.CollectiveCounter() as collectives:
        first.backward()
        (second * 2).backward()
    error = ref.relative_error(gradients_of(engine), {name: 3 * gradient for name, gradient in full.items()})
    report = engine.backward(own)
    assert report.items == ref.count(batch)
    return error, ref.relative_error(gradients_of(engine), full), loss_error, sum(collectives.large.values())


def with_metrics(how: str, sizes: Sequence[int], *, backward: bool) -> tuple[float, list[int], int]:
    """Run a loss that all-reduces in its forward, or also in its backward; return error, micro-batches and calls."""
    batch, full = reference_of(sizes)
    calls = []

    def loss_fn(model: nn.Module, part: ref.Batch) -> tuple[Tensor, int]:
        loss_sum, items = ref.mean_times_items(model, part)  # NaN without items
        metric = loss_sum.detach().clone()
        dist.all_reduce(metric)
        calls.append(items)
        return _AllReducedGradient.apply(loss_sum) if backward else loss_sum, items

    engine = make_engine(how, loss_fn, lockstep=True)
    own = cases.select_rows(batch, rows_of(dist.get_rank(), sizes))
    engine.loss(own).backward()
    error = ref.relative_error(gradients_of(engine), full)
    report = engine.backward(own)
    assert report.ranks is not None
    error = max(error, ref.relative_error(gradients_of(engine), full))
    return error, list(report.ranks.num_microbatches), len(calls)


class _AllReducedGradient(torch.autograd.Function):
    """Calls a collective in its backward, and changes nothing."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        dist.all_reduce(gradient.clone())
        return gradient


def bfloat16_in_lockstep(sizes: Sequence[int]) -> tuple[bool, float]:
    """Compare bfloat16 gradients in lockstep with those without it, bit by bit; and the noise that was measured."""
    batch, _ = reference_of(sizes)
    own = cases.select_rows(batch, rows_of(dist.get_rank(), sizes))
    found, noise = [], []
    for lockstep in (False, True):
        model, _ = cases.parallelize(ref.make_model(dtype=torch.bfloat16), "ddp")
        engine = bigbatch.Engine(model, None, ref.loss_and_items, microbatch=2, lockstep=lockstep, check=False)
        engine.backward(own)
        found.append(gradients_of(engine))
        assert engine.accumulator.noise is not None
        noise.append(engine.accumulator.noise.state_dict())
    same = all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    return same, float(noise[0] == noise[1])


def without_samples_at_first() -> str:
    """Open a first window in lockstep in which one rank has no sample."""
    engine = make_engine("ddp", lockstep=True)
    own = cases.select_rows(ref.ragged_batch(4), [0, 1] if dist.get_rank() else [])
    try:
        engine.backward(own)
    except ValueError as error:
        return str(error)
    return ""


def memory_in_lockstep() -> str:
    """Run out of memory on all ranks in lockstep."""

    def loss_fn(model: nn.Module, part: ref.Batch) -> tuple[Tensor, int]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = make_engine("ddp", loss_fn, lockstep=True)
    try:
        engine.backward(ref.ragged_batch(4))
    except ShardedMemoryError as error:
        return first_line(error)
    return ""


def refusals() -> list[str]:
    """Return the errors of settings that lockstep does not support."""
    found = []
    for settings in ({"microbatch": "auto"},):
        try:
            make_engine("ddp", lockstep=True, **settings)
        except ValueError as error:
            found.append(str(error))
    return found


def trained_like_one_process(how: str, sizes: Sequence[int]) -> float:
    """Train by `Engine.loss` and an own optimizer; return the error of the parameters against one process."""
    model, sync = cases.parallelize(ref.make_model(), how)
    engine = bigbatch.Engine(model, None, ref.loss_and_items, microbatch=3, sync=sync, check=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = [ref.ragged_batch(sum(sizes), seed=seed) for seed in range(3)]
    reference = copy.deepcopy(ref.make_model())
    expected = ref.train_reference(
        reference, lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), batches
    )
    for batch in batches:
        optimizer.zero_grad()
        engine.loss(cases.select_rows(batch, rows_of(dist.get_rank(), sizes))).backward()
        optimizer.step()
    found = {name: cases.full_tensor(p.detach()) for name, p in engine.sync.module.named_parameters()}
    return ref.relative_error(found, expected.parameters)


def nonfinite_on_one_rank() -> tuple[bool, bool]:
    """Return whether the loss and all gradients are NaN here, with NaN in the data of the last rank only."""

    def loss_fn(model: nn.Module, part: ref.Batch) -> tuple[Tensor, int]:
        loss_sum, items = ref.loss_and_items(model, part)
        return loss_sum * (float("nan") if dist.get_rank() else 1.0), items

    engine = make_engine("ddp", loss_fn)
    loss = engine.loss(ref.ragged_batch(5))
    loss.backward()
    return bool(loss.isnan()), all(bool(gradient.isnan().all()) for gradient in gradients_of(engine).values())
