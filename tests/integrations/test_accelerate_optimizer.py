"""Windows of ExactAccelerator whose last micro-batch has no backward, or that are dropped."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor

import bigbatch
from bigbatch.integrations.accelerate import ExactAccelerator
from integrations import accelerate_cases as cases
from support import distributed_windows as windows
from support import full_batch_reference as ref
from support.process_pool import Pools

EXACT = 1e-12
LAST = (2, 5, 7)
"""The last micro-batches of the windows in an epoch of `cases.SIZES`."""

SKIPPED = (
    "the last micro-batch of this window had no backward(items=...) on this rank, and only this call averages "
    "gradients and adds up items over ranks: call it for the last micro-batch of every window on every rank, with "
    "items=0 and the sum of its losses, 0, if it has no items."
)
CHANGED = (
    "the last micro-batch of this window had no backward(items=...), and the gradient was changed before it was "
    "divided: clip with accelerator.clip_grad_norm_() or accelerator.clip_grad_value_(), which divide first, or call "
    "accelerator.unscale_gradients() before you change the gradient."
)
NOT_PREPARED = (
    "the last micro-batch of this window had no backward(items=...), and no optimizer was prepared whose step divides "
    "the gradient: pass the optimizer to accelerator.prepare()."
)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    with cases.fresh_state():
        yield


def make(
    steps: int = cases.STEPS, make_optimizer: Callable[..., Any] = windows.GradientRecorder
) -> tuple[ExactAccelerator, Any, Any]:
    accelerator = ExactAccelerator(cpu=True, gradient_accumulation_steps=steps)
    model = ref.make_model()
    return accelerator, *accelerator.prepare(model, make_optimizer(model, lr=0.1))


def add(accelerator: ExactAccelerator, model: Any, part: ref.Batch) -> None:
    loss_sum, items = ref.loss_and_items(model, part)
    accelerator.backward(loss_sum, items=items)


def train(
    accelerator: ExactAccelerator,
    model: Any,
    optimizer: Any,
    *,
    skipped: tuple[int, ...] = LAST,
    after: Callable[[], object] = lambda: None,
) -> None:
    """Run an epoch in which micro-batches have no backward, and call a function before each update."""
    for index, part in enumerate(cases.make_loader()):
        with accelerator.accumulate(model):
            if index not in skipped:
                add(accelerator, model, part)
            if accelerator.sync_gradients:
                after()
            optimizer.step()
            optimizer.zero_grad()


def expected(max_grad_norm: float | None = None) -> dict[str, Tensor]:
    """Return the parameters after an epoch without the last micro-batch of each window, in plain torch."""
    parts = cases.microbatches()
    return ref.train_reference(
        ref.make_model(),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        [windows.pad(kept) for kept in (parts[0:2], parts[3:5], parts[6:7])],
        max_grad_norm=max_grad_norm,
    ).parameters


def full(parts: list[ref.Batch]) -> dict[str, Tensor]:
    return ref.full_gradient(ref.make_model(), windows.pad(parts))


def test_skipped_last_microbatches_leave_exact_updates():
    accelerator, model, optimizer = make()
    train(accelerator, model, optimizer)
    assert ref.relative_error(ref.parameters_of(model), expected()) <= EXACT
    assert accelerator.bigbatch_report is not None
    assert accelerator.bigbatch_report.items == ref.count(cases.microbatches()[6])
    assert accelerator.bigbatch_report.num_microbatches == 1


def test_skipped_window_is_divided_before_norm_clipping():
    accelerator, model, optimizer = make()
    train(accelerator, model, optimizer, after=lambda: accelerator.clip_grad_norm_(model.parameters(), 0.1))
    assert ref.relative_error(ref.parameters_of(model), expected(0.1)) <= EXACT


def test_skipped_window_is_divided_before_value_clipping():
    accelerator, model, optimizer = make()
    parts = cases.microbatches()
    for index, part in enumerate(parts[:3]):
        with accelerator.accumulate(model):
            if index != 2:
                add(accelerator, model, part)
            if accelerator.sync_gradients:
                accelerator.clip_grad_value_(model.parameters(), 0.01)
            optimizer.step()
    clipped = {name: value.clamp(-0.01, 0.01) for name, value in full(parts[:2]).items()}
    assert ref.relative_error(optimizer.optimizer.seen[0], clipped) <= EXACT


def test_unscaling_divides_before_own_changes():
    accelerator, model, optimizer = make()

    def clip() -> None:
        accelerator.unscale_gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    train(accelerator, model, optimizer, after=clip)
    assert ref.relative_error(ref.parameters_of(model), expected(0.1)) <= EXACT


def test_clipping_by_torch_before_division_is_refused():
    accelerator, model, optimizer = make()
    before = ref.parameters_of(model)
    with pytest.raises(bigbatch.InputError) as raised:
        train(accelerator, model, optimizer, after=lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    assert str(raised.value) == CHANGED
    assert all(torch.equal(before[name], value) for name, value in ref.parameters_of(model).items())


def test_skipped_windows_with_grad_scaler_are_exact():
    accelerator, model, optimizer = make()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = accelerator.prepare_optimizer(optimizer.optimizer)
    train(accelerator, model, optimizer)
    assert not optimizer.step_was_skipped
    assert ref.relative_error(ref.parameters_of(model), expected()) <= EXACT


def test_overflow_of_skipped_window_ends_it():
    accelerator, model, optimizer = make()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = accelerator.prepare_optimizer(optimizer.optimizer)
    parts = cases.microbatches()[:6]
    for index, part in enumerate(parts):
        with accelerator.accumulate(model):
            loss_sum, items = ref.loss_and_items(model, part)
            if index != 2:
                accelerator.backward(loss_sum * (float("inf") if index == 1 else 1.0), items=items)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            assert optimizer.step_was_skipped == (2 <= index < 5)
    assert ref.relative_error(optimizer.optimizer.seen[0], full(parts[3:])) <= EXACT


def test_every_optimizer_gets_gradient_of_skipped_window():
    accelerator, model, optimizer = make()
    accelerator.free_memory()
    halves = [list(model.parameters())[::2], list(model.parameters())[1::2]]
    model, first, second = accelerator.prepare(model, *(torch.optim.SGD(half, lr=0.1) for half in halves))
    for index, part in enumerate(cases.make_loader()):
        with accelerator.accumulate(model):
            if index not in LAST:
                add(accelerator, model, part)
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
    assert ref.relative_error(ref.parameters_of(model), expected()) <= EXACT


def test_window_without_any_backward_changes_nothing():
    accelerator, model, optimizer = make()
    before = ref.parameters_of(model)
    train(accelerator, model, optimizer, skipped=tuple(range(8)))
    assert all(torch.equal(before[name], value) for name, value in ref.parameters_of(model).items())
    assert accelerator.bigbatch_report is None


def test_step_after_no_sync_blocks_divides():
    accelerator, model, optimizer = make(steps=1)
    parts = cases.microbatches()[:2]
    for part in parts:
        with accelerator.no_sync(model):
            add(accelerator, model, part)
    optimizer.step()
    assert ref.relative_error(optimizer.optimizer.seen[0], full(parts)) <= EXACT


def test_window_without_update_includes_the_next():
    accelerator, model, optimizer = make()
    parts = cases.microbatches()[:6]
    for index, part in enumerate(parts):
        with accelerator.accumulate(model):
            if index == 2:
                continue
            add(accelerator, model, part)
            optimizer.step()
            optimizer.zero_grad()
    assert ref.relative_error(optimizer.optimizer.seen[0], full(parts[:2] + parts[3:])) <= EXACT


@pytest.mark.parametrize("calls", [True, False])
def test_closure_of_last_step_ends_the_window(calls: bool):
    accelerator, model, optimizer = make(make_optimizer=lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr))
    parts = cases.microbatches()[:3]

    def closure() -> None:
        if calls:
            add(accelerator, model, parts[2])

    for index, part in enumerate(parts):
        with accelerator.accumulate(model):
            if index < 2:
                add(accelerator, model, part)
            optimizer.step(closure)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ref.relative_error(found, full(parts if calls else parts[:2])) <= EXACT


def test_optimizer_must_be_prepared_to_be_divided():
    accelerator = ExactAccelerator(cpu=True, gradient_accumulation_steps=2)
    model = accelerator.prepare(ref.make_model())
    with accelerator.accumulate(model):
        add(accelerator, model, ref.ragged_batch(4))
    with pytest.raises(bigbatch.InputError) as raised, accelerator.accumulate(model):
        pass
    assert str(raised.value) == NOT_PREPARED


def test_optimizers_of_other_accelerators_are_wrapped_again():
    model = ref.make_model()
    stock = Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator = ExactAccelerator(cpu=True, gradient_accumulation_steps=3)
    model, optimizer = accelerator.prepare(model, stock)
    assert optimizer is not stock
    assert optimizer.optimizer is stock.optimizer
    assert accelerator.prepare(optimizer) is optimizer
    assert accelerator._optimizers == [optimizer]
    train(accelerator, model, optimizer)
    assert ref.relative_error(ref.parameters_of(model), expected()) <= EXACT


def test_copy_of_optimizer_ends_no_window():
    accelerator, model, optimizer = make(make_optimizer=lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr))
    with accelerator.accumulate(model):
        add(accelerator, model, ref.ragged_batch(4))
    other = copy.deepcopy(optimizer)
    accelerator.gradient_state._set_sync_gradients(True)
    other.step()
    assert accelerator.bigbatch_report is None
    optimizer.step()
    assert accelerator.bigbatch_report is not None


@pytest.mark.parametrize("sync", ["last", "each", "sharded", "sharded each"])
def test_ranks_refuse_skipped_last_microbatch(pools: Pools, sync: str):
    assert pools(2).run(_skip_on_ranks, sync) == [(SKIPPED, 0)] * 2


def _skip_on_ranks(sync: str) -> tuple[str, int]:
    """Return the refusal of an update, and the number of collectives it took."""
    with cases.fresh_state():
        accelerator, model, optimizer = _make_on_ranks(sync)
        parts = cases.microbatches(accelerator.process_index, 2)
        for part in parts[:2]:
            with accelerator.accumulate(model):
                add(accelerator, model, part)
        with accelerator.accumulate(model), windows.CollectiveCounter() as counter:
            with pytest.raises(bigbatch.InputError) as raised:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            with pytest.raises(bigbatch.InputError, match="had no backward"):
                optimizer.step()
        return str(raised.value), sum(counter.small.values()) + sum(counter.large.values())


def _make_on_ranks(sync: str) -> tuple[ExactAccelerator, Any, Any]:
    plugin = GradientAccumulationPlugin(num_steps=cases.STEPS, sync_each_batch=sync.endswith("each"))
    if sync.startswith("sharded"):
        return cases.make_sharded(plugin)
    accelerator = ExactAccelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model = ref.make_model()
    return accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_ranks_may_skip_all_but_the_last(pools: Pools):
    for error in pools(2).run(_skip_first_of_a_rank):
        assert error <= EXACT


def _skip_first_of_a_rank() -> float:
    with cases.fresh_state():
        accelerator, model, _ = _make_on_ranks("last")
        rank = accelerator.process_index
        for index, part in enumerate(cases.microbatches(rank, 2)[:3]):
            with accelerator.accumulate(model):
                if (rank, index) != (1, 1):
                    add(accelerator, model, part)
        found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
        return ref.relative_error(found, full(cases.microbatches(0, 2)[:3] + cases.microbatches(1, 2)[:3:2]))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("dropped_at", [0, 1])
def test_dropped_gradients_do_not_count(set_to_none: bool, dropped_at: int):
    accelerator, model, optimizer = make()
    parts = cases.microbatches()[:3]
    for index, part in enumerate(parts):
        with accelerator.accumulate(model):
            add(accelerator, model, part)
            if index == dropped_at:
                model.zero_grad(set_to_none=set_to_none)
            optimizer.step()
    assert ref.relative_error(optimizer.optimizer.seen[0], full(parts[dropped_at + 1 :])) <= EXACT
    assert accelerator.bigbatch_report is not None
    assert accelerator.bigbatch_report.items == sum(map(ref.count, parts[dropped_at + 1 :]))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_dropped_window_ends_at_its_update(set_to_none: bool):
    accelerator, model, optimizer = make()
    parts = cases.microbatches()[:6]
    for index, part in enumerate(parts):
        with accelerator.accumulate(model):
            if index == 2:
                model.zero_grad(set_to_none=set_to_none)
            else:
                add(accelerator, model, part)
            optimizer.step()
    assert not any(gradient.any() for gradient in optimizer.optimizer.seen[0].values())
    assert ref.relative_error(optimizer.optimizer.seen[1], full(parts[3:])) <= EXACT


def test_gradient_that_is_zero_counts():
    accelerator, model, optimizer = make()
    parts = cases.microbatches()[:3]
    for index, part in enumerate(parts):
        with accelerator.accumulate(model):
            loss_sum, items = ref.loss_and_items(model, part)
            accelerator.backward(loss_sum * (0 if index == 0 else 1), items=items)
            optimizer.step()
    assert accelerator.bigbatch_report is not None
    assert accelerator.bigbatch_report.items == sum(map(ref.count, parts))
    share = sum(map(ref.count, parts[1:])) / sum(map(ref.count, parts))
    expected = {name: gradient * share for name, gradient in full(parts[1:]).items()}
    assert ref.relative_error(optimizer.optimizer.seen[0], expected) <= EXACT


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("sync", ["last", "each", "sharded", "sharded each"])
def test_ranks_drop_gradients_with_their_count(pools: Pools, sync: str, set_to_none: bool):
    for errors in pools(2).run(_drop_on_ranks, sync, set_to_none):
        assert max(errors) <= EXACT


def _drop_on_ranks(sync: str, set_to_none: bool) -> list[float]:
    """Return the errors of two windows that are dropped after their first micro-batch."""
    with cases.fresh_state():
        accelerator, model, _ = _make_on_ranks(sync)
        errors = []
        num_held_back = 0
        for start in (0, 3):
            for index in range(start, start + 3):
                with accelerator.accumulate(model):
                    add(accelerator, model, cases.microbatches(accelerator.process_index, 2)[index])
                    if index == 0:  # FSDP2 keeps what it has not reduced, and its items still count
                        num_held_back = int(all(parameter.grad is None for parameter in model.parameters()))
                    if index == start:
                        model.zero_grad(set_to_none=set_to_none)
            if sync.startswith("sharded"):
                found = cases.full_gradients(model)
            else:
                found = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}
            kept = slice(start + 1 - num_held_back, start + 3)
            errors.append(
                ref.relative_error(found, full([part for r in range(2) for part in cases.microbatches(r, 2)[kept]]))
            )
            model.zero_grad(set_to_none=set_to_none)
        assert num_held_back == 0 or sync == "sharded"
        return errors
