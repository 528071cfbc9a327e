"""`Window.finish` leaves the exact gradient in ``.grad``, and the update to the caller."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigbatch
from bigbatch import WindowState, WindowStateError
from support import full_batch_reference as ref

EXACT = 1e-12
WRONG = 1e-3


def finish(accumulator, parts):
    window = accumulator.window(parts)
    for part in window:
        window.backward(ref.loss_and_items(accumulator.model, part))
    return window.finish(), window


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters()}


def make(max_grad_norm=None, **settings):
    model = ref.make_model()
    return model, bigbatch.Accumulator(model, None, max_grad_norm=max_grad_norm, **settings)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 11])
def test_finished_gradient_equals_full_batch(size):
    model, accumulator = make()
    batch = ref.ragged_batch(11)
    parts = ref.cut(batch, size)
    report, window = finish(accumulator, parts)
    full = ref.full_gradient(model, batch)
    assert ref.relative_error(gradients_of(model), full) <= EXACT
    assert window.state is WindowState.CLOSED
    assert (report.step, report.items, report.skipped) == (0, ref.count(batch), None)
    assert report.num_microbatches == len(parts)
    if len(parts) > 1:
        assert ref.relative_error(ref.mean_of_means_gradient(model, parts), full) > WRONG


def test_finish_removes_every_hook():
    model, accumulator = make()
    finish(accumulator, ref.cut(ref.ragged_batch(6), 2))
    assert ref.hooks_of(model) == 0


def test_gradients_stay_until_next_window():
    model, accumulator = make()
    finish(accumulator, ref.cut(ref.ragged_batch(6), 2))
    first = gradients_of(model)
    assert all(gradient is not None for gradient in first.values())
    window = accumulator.window()
    assert all(gradient is None for gradient in gradients_of(model).values())
    window.abort()


def test_abort_after_finish_keeps_gradients():
    model, accumulator = make()
    _, window = finish(accumulator, ref.cut(ref.ragged_batch(6), 2))
    window.abort()
    assert all(gradient is not None for gradient in gradients_of(model).values())
    with pytest.raises(
        WindowStateError,
        match=re.escape(
            "window.finish() was called on a window that is closed. A window ends with its step(), finish() or "
            "abort(); take the next one from the accumulator."
        ),
    ):
        window.finish()


def test_own_update_after_finish_equals_step():
    batches = [ref.ragged_batch(7, seed=seed) for seed in range(3)]
    theirs, ours = ref.make_model(), ref.make_model()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    own = torch.optim.AdamW(ours.parameters(), lr=0.01)
    stepping = bigbatch.Accumulator(theirs, optimizer, max_grad_norm=0.1)
    finishing = bigbatch.Accumulator(ours, own, max_grad_norm=0.1)
    for batch in batches:
        ref.run_windows(stepping, ref.cut(batch, 3), num_microbatches=3)
        finish(finishing, ref.cut(batch, 3))
        own.step()
    assert all(map(torch.equal, theirs.parameters(), ours.parameters()))
    assert (stepping.num_steps, finishing.num_steps) == (3, 0)


def test_finish_clips_then_calls_hook():
    seen = []
    model, accumulator = make(max_grad_norm=0.01, gradient_hook=lambda parameters: seen.append(len(parameters)))
    batch = ref.ragged_batch(9)
    report, _ = finish(accumulator, ref.cut(batch, 2))
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    full = torch.nn.utils.get_total_norm(list(ref.full_gradient(model, batch).values()))
    assert float(norm) == pytest.approx(0.01 / (1 + 1e-6 / float(full)), rel=1e-9)
    assert report.grad_norm == pytest.approx(float(full), rel=EXACT)
    assert seen == [len(list(model.parameters()))]


def test_bfloat16_gradients_are_float32_sums_rounded_once():
    torch.manual_seed(3)
    model = nn.Linear(5, 3, bias=False).to(torch.bfloat16)
    inputs, targets = torch.randn(400, 5).bfloat16(), torch.randn(400, 3).bfloat16()
    accumulator = bigbatch.Accumulator(model, None)
    window = accumulator.window()
    total = torch.zeros(3, 5)
    narrow = torch.zeros(3, 5, dtype=torch.bfloat16)
    for x, y in zip(inputs.split(2), targets.split(2), strict=True):
        loss_sum = F.mse_loss(model(x), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss_sum, [model.weight], retain_graph=True)
        total += gradient
        narrow += gradient
        window.backward(loss_sum, items=y.numel())
    window.finish()
    assert model.weight.grad.dtype == torch.bfloat16
    assert torch.equal(model.weight.grad, (total / 1200).bfloat16())
    assert not torch.equal(model.weight.grad, (narrow / 1200).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_nonfinite_window_leaves_nan_in_every_gradient(dtype, poison):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).to(dtype)
    accumulator = bigbatch.Accumulator(model, None)
    window = accumulator.window()
    for factor in (1.0, float("nan")):
        loss_sum = model(torch.ones(2, 3, dtype=dtype)).sum()
        loss_sum = loss_sum + (loss_sum.detach() if poison == "loss" else loss_sum) * factor
        window.backward(loss_sum, items=2)
    report = window.finish()
    assert report.skipped == ("non-finite loss" if poison == "loss" else "non-finite gradient")
    assert all(p.grad.isnan().all() and p.grad.dtype == dtype for p in model.parameters())


def test_nonfinite_raise_clears_gradients():
    model, accumulator = make(nonfinite="raise")
    window = accumulator.window()
    window.backward(next(model.parameters()).sum() * float("inf"), items=1)
    with pytest.raises(bigbatch.NonFiniteError, match=r"^the window has a non-finite gradient, and changed nothing:"):
        window.finish()
    assert all(gradient is None for gradient in gradients_of(model).values())
    assert window.state is WindowState.ABORTED


def test_window_without_items_leaves_no_gradient():
    model, accumulator = make()
    window = accumulator.window()
    window.backward(sum(p.sum() for p in model.parameters()), items=0)
    report = window.finish()
    assert (report.skipped, report.items) == ("no items", 0)
    assert all(gradient is None for gradient in gradients_of(model).values())


def test_step_without_optimizer_raises():
    model, accumulator = make()
    window = accumulator.window()
    window.backward(sum(p.sum() for p in model.parameters()), items=1)
    with pytest.raises(
        WindowStateError,
        match=re.escape(
            "step() was called without an optimizer: pass an optimizer instead of None, or call finish() of the "
            "window, or backward() or loss() of the engine, and update the weights yourself."
        ),
    ):
        window.step()


def test_parameters_are_those_trained_at_each_window():
    model, accumulator = make()
    parts = ref.cut(ref.ragged_batch(6), 2)
    model.hidden.requires_grad_(False)
    finish(accumulator, parts)
    assert model.hidden.weight.grad is None
    model.hidden.requires_grad_(True)
    model.embedding.requires_grad_(False)
    finish(accumulator, parts)
    assert model.hidden.weight.grad is not None
    full = ref.full_gradient(model, ref.ragged_batch(6))
    assert ref.relative_error({name: gradients_of(model)[name] for name in full}, full) <= EXACT


def test_frozen_model_without_optimizer_is_rejected():
    with pytest.raises(
        ValueError,
        match=re.escape(
            "no parameter of the Linear requires a gradient, and there is no optimizer: pass a model that is to be "
            "trained, or call requires_grad_() on the layers that are."
        ),
    ):
        bigbatch.Accumulator(nn.Linear(2, 2).requires_grad_(False), None)


def test_scheduler_without_optimizer_is_rejected():
    model = nn.Linear(2, 2)
    scheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(
        ValueError,
        match=re.escape(
            "scheduler= was passed without an optimizer, whose updates it would follow: pass the optimizer instead of "
            "None, or leave scheduler= out and call scheduler.step() after your own update."
        ),
    ):
        bigbatch.Accumulator(model, None, scheduler=scheduler)


def test_scaler_without_optimizer_is_only_read():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accumulator = bigbatch.Accumulator(model, None, scaler=scaler)
    window = accumulator.window()
    incoming = []
    for x in torch.randn(3, 5, 4):
        output = model(x)
        output.register_hook(lambda gradient: incoming.append(float(gradient.abs().max())))
        window.backward(output.sum(), items=8)
    window.finish()
    plain = nn.Linear(4, 2)
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    nn.Linear(4, 2)
    (plain(torch.randn(3, 5, 4)).sum() / 24).backward()
    assert min(incoming) == 1024.0 / 8  # scaled, and divided by a power of two near the items
    torch.testing.assert_close(model.weight.grad, plain.weight.grad)
    assert scaler.get_scale() == 1024.0


def test_loop_of_windows_ends_with_finish():
    model, accumulator = make()
    batch = ref.ragged_batch(7)
    errors = []
    for index, window in enumerate(accumulator.windows(ref.cut(batch, 1), num_microbatches=4)):
        for part in window:
            window.backward(ref.loss_and_items(model, part))
        window.finish()
        rows = {name: column[4 * index : 4 * index + 4] for name, column in batch.items()}
        errors.append(ref.relative_error(gradients_of(model), ref.full_gradient(model, rows)))
    assert len(errors) == 2
    assert max(errors) <= EXACT
