"""Graphs that do not show which parameters they reach: hooks with a backward of their own, reentrant checkpoints."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bigbatch
from bigbatch.gradients.gradient_sums import GradientSums
from support import full_batch_reference as ref

BOUND = {torch.float64: 1e-12, torch.bfloat16: 3e-2}


def tower(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)).to(dtype)


def pairs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(2, 8, 5, generator=generator, dtype=torch.float64).to(dtype)


def contrast(left: Tensor, right: Tensor) -> Tensor:
    left, right = (F.normalize(side.double(), dim=1) for side in (left, right))
    return F.cross_entropy(left @ right.T * 3, torch.arange(len(left)), reduction="sum")


def cached_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Compute the loss from features without a graph; its hook runs the backward of the model, in chunks."""
    with torch.no_grad():
        features = [model(side) for side in batch]
    leaves = [feature.requires_grad_() for feature in features]
    contrast(*leaves).backward()
    surrogate = contrast(*(feature.detach() for feature in features)).requires_grad_()

    def differentiate(factor: Tensor) -> None:
        with torch.enable_grad():
            for side, leaf in zip(batch, leaves, strict=True):
                for rows, gradient in zip(side.split(3), leaf.grad.split(3), strict=True):
                    (model(rows) * gradient).sum().mul(factor).backward()

    surrogate.register_hook(differentiate)
    return surrogate, len(batch[0])


def full_gradient(model, dtype):
    return ref.gradients_of(model, contrast(*(model(side) for side in pairs(dtype))) / 8)


@pytest.mark.parametrize("dtype", BOUND)
def test_leaf_loss_runs_its_hook_in_window(dtype):
    model = tower(dtype)
    full = full_gradient(model, dtype)
    optimizer = ref.RecordingSGD(model)
    window = bigbatch.Accumulator(model, optimizer).window()
    loss, items = cached_loss(model, tuple(pairs(dtype)))
    window.backward(loss, items=items)
    window.step()
    assert ref.relative_error(optimizer.recorded[0], full) <= BOUND[dtype]


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_engine_with_leaf_loss_equals_plain_torch(make):
    model, plain = tower(), tower()
    optimizer = make(plain.parameters(), lr=0.1)
    engine = bigbatch.Engine(model, make(model.parameters(), lr=0.1), cached_loss, microbatch=8)
    for _ in range(2):
        engine.step(tuple(pairs()))
        loss, items = cached_loss(plain, tuple(pairs()))
        (loss / items).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ref.relative_error(ref.parameters_of(model), ref.parameters_of(plain)) <= 1e-12


def test_scaled_leaf_loss_runs_its_hook():
    """As with several terms or float16: the loss that is differentiated is the leaf times a factor."""
    model = tower()
    full = full_gradient(model, torch.float64)
    optimizer = ref.RecordingSGD(model)
    engine = bigbatch.Engine(
        model,
        optimizer,
        lambda m, batch: {"pairs": cached_loss(m, batch)},
        microbatch=8,
        count_items=lambda batch: {"pairs": len(batch[0])},
    )
    engine.step(tuple(pairs()))
    assert ref.relative_error(optimizer.recorded[0], full) <= 1e-12


def test_scaled_leaf_loss_after_others_runs_its_hook():
    model = tower()
    with GradientSums(model.parameters()) as sums:
        sums.backward(model(pairs()[0]).sum())
        first = [total.clone() for total in sums.tensors()]
        loss, items = cached_loss(model, tuple(pairs()))
        sums.backward(loss / items)
        added = [total - before for total, before in zip(sums.tensors(), first, strict=True)]
    named = dict(zip(dict(model.named_parameters()), added, strict=True))
    assert ref.relative_error(named, full_gradient(model, torch.float64)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameter_itself_is_a_loss(dtype):
    model = nn.Linear(2, 1).to(dtype)
    model.temperature = nn.Parameter(torch.tensor(2.5, dtype=dtype))
    optimizer = ref.RecordingSGD(model)
    window = bigbatch.Accumulator(model, optimizer).window()
    window.backward(model(torch.ones(3, 2, dtype=dtype)).sum(), items=3)
    window.backward(model.temperature, items=1)
    report = window.step()
    assert optimizer.recorded[0]["temperature"].item() == 0.25
    assert optimizer.recorded[0]["bias"].item() == 0.75
    assert report.items == 4


def test_later_reentrant_checkpoint_is_refused():
    model = tower()
    with GradientSums(model.parameters()) as sums:
        sums.backward(model(pairs()[0]).sum())
        hidden = checkpoint(model[:2], pairs()[0].requires_grad_(), use_reentrant=True)
        with pytest.raises(bigbatch.WindowStateError) as refused:
            sums.backward(model[2](hidden).sum())
    assert str(refused.value) == (
        "a micro-batch runs a reentrant checkpoint, or a hook with a backward of its own, and earlier ones did not: "
        "only the first of a window shows that such parameters exist. Pass use_reentrant=False to "
        "torch.utils.checkpoint.checkpoint, or run such a micro-batch first; if it is switched on between two windows, "
        "run this window again."
    )


def test_reentrant_checkpoint_switched_on_between_windows_is_refused_once():
    """The first graph of a window is walked only if those of the window before may hide leaves."""
    model = tower()
    full = ref.gradients_of(model, model(pairs()[0]).square().sum() / 8)
    optimizer = ref.RecordingSGD(model)
    accumulator = bigbatch.Accumulator(model, optimizer)

    def window(use_reentrant: bool | None) -> None:
        opened = accumulator.window()
        for part in pairs()[0].split([3, 5]):
            hidden = model[0](part)
            hidden = model[1](hidden) if use_reentrant is None else checkpoint(model[1], hidden, use_reentrant=True)
            opened.backward(model[2](hidden).square().sum(), items=len(part))
        opened.step()

    window(None)
    with pytest.raises(bigbatch.WindowStateError, match="switched on between two windows, run this window again"):
        window(True)
    window(True)
    assert len(optimizer.recorded) == 2
    for recorded in optimizer.recorded:
        assert ref.relative_error(recorded, full) <= 1e-12


def test_leaf_loss_after_plain_windows_runs_its_hook():
    model = tower()
    full = full_gradient(model, torch.float64)
    optimizer = ref.RecordingSGD(model)
    accumulator = bigbatch.Accumulator(model, optimizer)
    with accumulator.window() as window:
        window.backward(model(pairs()[0]).sum(), items=8)
        window.step()
    with accumulator.window() as window:
        loss, items = cached_loss(model, tuple(pairs()))
        window.backward(loss, items=items)
        window.step()
    assert ref.relative_error(optimizer.recorded[1], full) <= 1e-12


def test_later_reentrant_checkpoint_before_parameters_is_refused():
    """Its input depends on a parameter, so autograd runs it, and it raises."""
    model = tower()
    with GradientSums(model.parameters()) as sums:
        sums.backward(model(pairs()[0]).sum())
        hidden = checkpoint(model[1:], model[0](pairs()[0]), use_reentrant=True)
        with pytest.raises(bigbatch.WindowStateError, match="runs a reentrant checkpoint"):
            sums.backward(hidden.sum())


@pytest.mark.parametrize("dtype", BOUND)
def test_reentrant_checkpoint_in_every_microbatch_is_exact(dtype):
    model = tower(dtype)
    full = ref.gradients_of(model, model(pairs(dtype)[0]).float().square().sum() / 8)
    optimizer = ref.RecordingSGD(model)
    window = bigbatch.Accumulator(model, optimizer).window()
    for part in pairs(dtype)[0].split([3, 5]):
        hidden = checkpoint(model[:2], part.clone().requires_grad_(), use_reentrant=True)
        window.backward(model[2](hidden).float().square().sum(), items=len(part))
    window.step()
    assert ref.relative_error(optimizer.recorded[0], full) <= BOUND[dtype]


def test_frozen_inside_window_gets_no_more():
    model = tower()
    with GradientSums(model.parameters()) as sums:
        sums.backward(model(pairs()[0]).sum())
        before = model[0].weight.grad.clone()
        model[0].requires_grad_(False)
        sums.backward(model(pairs()[0]).sum())
        assert torch.equal(model[0].weight.grad, before)
        assert model[2].bias.grad.tolist() == [16, 16, 16]
        model.requires_grad_(False)
        with pytest.raises(ValueError, match="does not depend on any parameter that requires a gradient"):
            sums.backward(model(pairs()[0].requires_grad_()).sum())
