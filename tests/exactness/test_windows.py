"""Partial windows, windows without items and non-finite ones: nothing dropped, nothing leaked, nothing changed."""

import copy

import pytest
import torch
import torch.nn.functional as F

import bigbatch
from support import full_batch_reference as ref

EXACT = 1e-12
WRONG = 1e-3


def without_items(samples=3, seed=0):
    batch = ref.ragged_batch(samples, seed=seed)
    return {**batch, "labels": torch.full_like(batch["labels"], ref.IGNORED)}


@pytest.mark.parametrize("left_over", [1, 2, 3])
def test_partial_window_divides_by_items_seen(left_over):
    model, batch = ref.make_model(), ref.ragged_batch(8 + left_over, seed=5)
    batch["labels"][8:, 0] = 1
    optimizer = ref.RecordingSGD(model)
    parts = ref.cut(batch, 1)
    first, last = ref.run_windows(bigbatch.Accumulator(model, optimizer), parts[: 4 + left_over], num_microbatches=4)
    assert (first.num_microbatches, last.num_microbatches) == (4, left_over)
    tail = {name: column[4 : 4 + left_over] for name, column in batch.items()}
    full = ref.full_gradient(model, tail)
    assert ref.relative_error(optimizer.recorded[1], full) <= EXACT
    textbook = {name: tensor * left_over / 4 for name, tensor in full.items()}  # divided by the nominal number
    assert ref.relative_error(textbook, full) > WRONG


def test_epochs_with_partial_windows_equal_full_batch_training():
    """The textbook loop would drop the tail of an epoch, or leak it into the first window of the next."""
    epochs = [ref.ragged_batch(11, seed=seed) for seed in (1, 2)]
    windows = [{name: column[a : a + 8] for name, column in epoch.items()} for epoch in epochs for a in (0, 8)]

    def make(module):
        return torch.optim.AdamW(module.parameters(), lr=0.05)

    full = ref.train_reference(ref.make_model(), make, windows)
    model = ref.make_model()
    accumulator = bigbatch.Accumulator(model, make(model))
    reports = []
    for epoch in epochs:
        reports += ref.run_windows(accumulator, ref.cut(epoch, 2), num_microbatches=4)
    assert [report.num_microbatches for report in reports] == [4, 2, 4, 2]
    assert [report.items for report in reports] == [ref.count(window) for window in windows]
    assert ref.relative_error(ref.parameters_of(model), full.parameters) <= 1e-10
    dropped = ref.train_reference(ref.make_model(), make, windows[::2])
    assert ref.relative_error(dropped.parameters, full.parameters) > WRONG


@pytest.mark.parametrize(("microbatches", "expected"), [(0, []), (1, [1]), (4, [4]), (8, [4, 4]), (9, [4, 4, 1])])
def test_no_window_is_empty(microbatches, expected):
    model = ref.make_model()
    accumulator = bigbatch.Accumulator(model, ref.RecordingSGD(model))
    parts = ref.cut(ref.ragged_batch(9), 1)[:microbatches]
    reports = ref.run_windows(accumulator, iter(parts), num_microbatches=4)
    assert [report.num_microbatches for report in reports] == expected


def test_microbatches_are_drawn_one_at_a_time():
    model, batch = ref.make_model(), ref.ragged_batch(8)
    accumulator = bigbatch.Accumulator(model, ref.RecordingSGD(model))
    drawn = []

    def loader():
        for part in ref.cut(batch, 1):
            drawn.append(part)
            yield part

    for number, window in enumerate(accumulator.windows(loader(), num_microbatches=4)):
        for index, microbatch in enumerate(window):
            assert len(drawn) == number * 4 + index + 1
            window.backward(ref.loss_and_items(model, microbatch))
        window.step()


def test_microbatches_left_by_break_join_next_window():
    model, batch = ref.make_model(), ref.ragged_batch(8, seed=2)
    optimizer = ref.RecordingSGD(model)
    accumulator = bigbatch.Accumulator(model, optimizer)
    seen = []
    for number, window in enumerate(accumulator.windows(ref.cut(batch, 1), num_microbatches=4)):
        for microbatch in window:
            seen.append(microbatch)
            window.backward(ref.loss_and_items(model, microbatch))
            if number == 0:
                break
        window.step()
    assert torch.equal(torch.cat([part["tokens"] for part in seen]), batch["tokens"])
    first, second, third = optimizer.recorded
    for gradient, (start, stop) in zip((first, second, third), ((0, 1), (1, 5), (5, 8)), strict=True):
        part = {name: column[start:stop] for name, column in batch.items()}
        assert ref.relative_error(gradient, ref.full_gradient(model, part)) <= EXACT


class Counting(ref.TokenModel):
    """Has a buffer that would change if the model were run."""

    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.zeros(3))


def state_of(model, optimizer, scheduler):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


def trained_setup():
    torch.manual_seed(0)
    model = Counting().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    return model, optimizer, scheduler


@pytest.mark.parametrize("use_engine", [True, False])
@pytest.mark.parametrize("loss_fn", [ref.loss_and_items, ref.mean_times_items])
def test_window_without_items_changes_nothing(use_engine, loss_fn):
    model, optimizer, scheduler = trained_setup()
    engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=2, scheduler=scheduler, max_grad_norm=1.0)

    def run(batch):
        if use_engine:
            return engine.step(batch)
        (report,) = ref.run_windows(engine.accumulator, ref.cut(batch, 2), num_microbatches=9, loss_fn=loss_fn)
        return report

    assert run(ref.ragged_batch(4)).step == 1
    before = state_of(model, optimizer, scheduler)
    report = run(without_items())
    assert_same(state_of(model, optimizer, scheduler), before)
    assert report.skipped == "no items"
    assert (report.step, report.items, report.num_microbatches) == (1, 0, 2)
    assert report.loss != report.loss
    assert report.grad_norm != report.grad_norm
    assert all(p.grad is None for p in model.parameters())
    assert run(ref.ragged_batch(4)).step == 2


def test_windows_without_items_do_not_affect_training():
    model, optimizer, scheduler = trained_setup()
    start = copy.deepcopy(model)
    engine = bigbatch.Engine(model, optimizer, ref.mean_times_items, microbatch=2, scheduler=scheduler)
    for batch in ref.batches(4):
        engine.step(without_items())
        engine.step(batch)
    full = ref.train_reference(
        start,
        lambda module: torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1),
        ref.batches(4),
        make_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    )
    assert ref.relative_error(ref.parameters_of(model), full.parameters) <= 1e-10


@pytest.mark.parametrize("poison", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_nonfinite_microbatch_skips_window(poison, max_grad_norm):
    model, optimizer, scheduler = trained_setup()
    batch = ref.ragged_batch(6)
    poisoned = []

    def loss_fn(module, microbatch):
        loss, items = ref.loss_and_items(module, microbatch)
        return (loss * poison, items) if poisoned and microbatch["tokens"] is not None and items else (loss, items)

    engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=2, scheduler=scheduler, max_grad_norm=max_grad_norm)
    assert engine.step(batch).skipped is None
    before = state_of(model, optimizer, scheduler)
    poisoned.append(True)
    report = engine.step(batch)
    assert report.skipped == "non-finite gradient"
    assert report.step == 1
    assert not torch.isfinite(torch.tensor(report.grad_norm))
    assert_same(state_of(model, optimizer, scheduler), before)
    assert all(p.grad is None for p in model.parameters())
    poisoned.clear()
    assert engine.step(batch).step == 2


def test_finite_gradient_with_overflowing_sum_is_applied():
    """The norm of the divided gradient is what counts; squares of the sum overflow float32 before it does."""
    model = torch.nn.Linear(1, 1)
    inputs = torch.full((4, 1), 1e19)

    def loss_fn(module, microbatch):
        return module(microbatch).sum(), len(microbatch)

    full = ref.gradients_of(model, model(inputs).mean())
    assert torch.isfinite(torch.nn.utils.get_total_norm(list(full.values())))
    optimizer = ref.RecordingSGD(model)
    report = bigbatch.Engine(model, optimizer, loss_fn, microbatch=1).step(inputs)
    assert report.skipped is None
    assert ref.relative_error(optimizer.recorded[0], full) <= 1e-6


def test_report_loss_covers_whole_window():
    model, batch = ref.make_model(), ref.ragged_batch(9, seed=4)
    (report,) = ref.run_windows(
        bigbatch.Accumulator(model, ref.RecordingSGD(model, lr=1.0)), ref.cut(batch, 2), num_microbatches=9
    )
    model = ref.make_model()
    assert report.loss == pytest.approx(ref.loss_mean(model, batch).item(), rel=EXACT)
    means = [ref.loss_mean(model, part).item() for part in ref.cut(batch, 2) if ref.count(part)]
    assert abs(sum(means) / len(means) / report.loss - 1) > WRONG
    assert abs(means[-1] / report.loss - 1) > WRONG


def test_image_and_pixel_windows_count_their_items():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(2, 1, 1)).double()
    images = [torch.randn(2, 1, size, size).double() for size in (3, 5, 9)]
    total = sum(image.numel() for image in images)
    full = ref.gradients_of(model, sum(F.mse_loss(model(x), x.square(), reduction="sum") for x in images) / total)
    naive = ref.gradients_of(model, sum(F.mse_loss(model(x), x.square()) for x in images) / 3)
    optimizer = ref.RecordingSGD(model)
    for window in bigbatch.Accumulator(model, optimizer).windows(images, num_microbatches=3):
        for x in window:
            window.backward(F.mse_loss(model(x), x.square(), reduction="sum"), items=x.numel())
        window.step()
    assert ref.relative_error(optimizer.recorded[0], full) <= EXACT
    assert ref.relative_error(naive, full) > WRONG
