"""Algorithm, in float64: the gradient of a window is that of the full batch, however it was cut."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bigbatch
from support import full_batch_reference as ref

EXACT = 1e-12
WRONG = 1e-3
SAMPLES = 12


def recorded_gradient(stepper, model, batch, size, **settings):
    optimizer = ref.RecordingSGD(model)
    report = stepper(model, optimizer, batch, size, **settings)
    (gradient,) = optimizer.recorded
    return gradient, report


@pytest.mark.parametrize("stepper", ref.STEPPERS.values(), ids=ref.STEPPERS.keys())
@pytest.mark.parametrize("loss_fn", [ref.loss_and_items, ref.mean_times_items])
@pytest.mark.parametrize("size", range(1, SAMPLES + 1))
def test_every_cut_gives_full_batch_gradient(stepper, loss_fn, size):
    model, batch = ref.make_model(), ref.ragged_batch(SAMPLES, seed=3)
    assert min(map(ref.count, ref.cut(batch, 1))) == 0, "the data must hold a sample without items"
    full = ref.full_gradient(model, batch)
    gradient, report = recorded_gradient(stepper, model, batch, size, loss_fn=loss_fn)
    assert ref.relative_error(gradient, full) <= EXACT
    if size < SAMPLES:
        assert ref.relative_error(ref.mean_of_means_gradient(model, ref.cut(batch, size)), full) > WRONG
    assert report.items == ref.count(batch)
    assert report.num_microbatches == -(-SAMPLES // size)
    assert report.loss == pytest.approx(ref.loss_mean(model, batch).item(), rel=EXACT)
    norm = torch.nn.utils.get_total_norm(list(full.values())).item()
    assert report.grad_norm == pytest.approx(norm, rel=EXACT)


@pytest.mark.parametrize("stepper", ref.STEPPERS.values(), ids=ref.STEPPERS.keys())
def test_unit_learning_rate_update_equals_gradient(stepper):
    model, batch = ref.make_model(), ref.ragged_batch(SAMPLES)
    before, full = ref.parameters_of(model), ref.full_gradient(model, batch)
    stepper(model, torch.optim.SGD(model.parameters(), lr=1.0), batch, 5)
    moved = {name: before[name] - after for name, after in ref.parameters_of(model).items()}
    assert ref.relative_error(moved, full) <= EXACT
    assert ref.relative_error(ref.mean_of_means_gradient(model, ref.cut(batch, 5)), full) > WRONG


def test_data_contains_microbatches_with_nan_mean_gradient():
    model = ref.make_model()
    empty = next(part for part in ref.cut(ref.ragged_batch(SAMPLES, seed=3), 1) if not ref.count(part))
    gradient = ref.gradients_of(model, ref.mean_times_items(model, empty)[0])
    assert any(tensor.isnan().any() for tensor in gradient.values())


@st.composite
def cut_batches(draw):
    """Samples with any mask at all, and any partition of them, micro-batches without an item included."""
    samples = draw(st.integers(1, 8))
    mask = draw(st.lists(st.booleans(), min_size=samples * ref.LENGTH, max_size=samples * ref.LENGTH))
    borders = draw(st.sets(st.integers(1, samples - 1))) if samples > 1 else set()
    edges = [0, *sorted(borders), samples]
    return torch.tensor(mask).reshape(samples, ref.LENGTH), [b - a for a, b in itertools.pairwise(edges)]


@settings(max_examples=60, deadline=None)
@given(cut_batches(), st.sampled_from([ref.loss_and_items, ref.mean_times_items]), st.integers(0, 3))
def test_any_mask_and_partition_gives_full_batch_gradient(cut_batch, loss_fn, seed):
    mask, sizes = cut_batch
    model, batch = ref.make_model(seed), ref.ragged_batch(len(mask), seed=seed)
    labels = torch.randint(ref.VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(seed))
    batch["labels"] = labels.masked_fill(~mask, ref.IGNORED)
    optimizer = ref.RecordingSGD(model, lr=0.1)
    before = ref.parameters_of(model)
    full = ref.full_gradient(model, batch) if mask.any() else None
    (report,) = ref.run_windows(
        bigbatch.Accumulator(model, optimizer), ref.cut(batch, sizes), num_microbatches=len(sizes), loss_fn=loss_fn
    )
    assert report.items == mask.sum()
    if full is None:
        assert report.skipped == "no items"
        assert not optimizer.recorded
        assert all(torch.equal(before[name], p) for name, p in ref.parameters_of(model).items())
    else:
        assert report.skipped is None
        assert ref.relative_error(optimizer.recorded[0], full) <= EXACT


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10), st.integers(1, 12), st.integers(0, 5))
def test_any_engine_microbatch_gives_full_batch_gradient(samples, size, seed):
    model, batch = ref.make_model(seed), ref.ragged_batch(samples, seed=seed)
    full = ref.full_gradient(model, batch)
    gradient, _ = recorded_gradient(ref.step_by_engine, model, batch, size, loss_fn=ref.mean_times_items)
    assert ref.relative_error(gradient, full) <= EXACT


def test_items_may_be_tensors_floats_or_weights():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1).double()
    inputs, targets = torch.randn(7, 3).double(), torch.randn(7, 1).double()
    weights = torch.rand(7, 1).double()

    def weighted(module, rows, wrap):
        inputs, targets, weights = rows
        return (weights * F.mse_loss(module(inputs), targets, reduction="none")).sum(), wrap(weights.sum())

    loss, total = weighted(model, (inputs, targets, weights), float)
    full = ref.gradients_of(model, loss / total)
    for wrap in (float, lambda items: items, lambda items: items.reshape(1)):
        optimizer = ref.RecordingSGD(model)
        accumulator = bigbatch.Accumulator(model, optimizer)
        parts = list(zip(inputs.split(3), targets.split(3), weights.split(3), strict=True))
        ref.run_windows(
            accumulator, parts, num_microbatches=3, loss_fn=lambda module, rows, wrap=wrap: weighted(module, rows, wrap)
        )
        assert ref.relative_error(optimizer.recorded[0], full) <= EXACT
    naive = sum((loss / items for loss, items in (weighted(model, rows, float) for rows in parts)), torch.zeros(()))
    assert ref.relative_error(ref.gradients_of(model, naive / 3), full) > WRONG


def test_grad_before_window_does_not_leak_in():
    model, batch = ref.make_model(), ref.ragged_batch(SAMPLES)
    full = ref.full_gradient(model, batch)
    for stepper in ref.STEPPERS.values():
        for p in model.parameters():
            p.grad = torch.full_like(p, 7.0)
        gradient, _ = recorded_gradient(stepper, model, batch, 5)
        assert ref.relative_error(gradient, full) <= EXACT
        assert all(p.grad is None for p in model.parameters())
        assert ref.hooks_of(model) == 0
