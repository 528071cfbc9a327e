"""Calls of ExactAccelerator that could not be exact raise, and the message names the call to make."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

import bigbatch
from bigbatch.integrations.accelerate import ExactAccelerator
from integrations import accelerate_cases as cases
from support import full_batch_reference as ref
from support.process_pool import Pools

COUNT = (
    " Count the items of the window before its first micro-batch, over all ranks, and call accelerator.backward("
    "loss_sum * accelerator.gradient_accumulation_steps * ranks / count) without items, where ranks is the "
    "number of ranks that hold different samples."
)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    with cases.fresh_state():
        yield


def make(steps: int = 3, **settings: Any) -> tuple[ExactAccelerator, Any, Any]:
    accelerator = ExactAccelerator(cpu=True, gradient_accumulation_steps=steps, **settings)
    model = ref.make_model()
    return accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def message(accelerator: ExactAccelerator, model: Any, **settings: Any) -> str:
    with pytest.raises(bigbatch.InputError) as raised:
        accelerator.backward(ref.loss_and_items(model, ref.ragged_batch(4))[0], **settings)
    return str(raised.value)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (DistributedType.DEEPSPEED, "DeepSpeed keeps gradients outside of .grad"),
        (DistributedType.MEGATRON_LM, "Megatron-LM runs backward itself"),
        (DistributedType.XLA, "XLA reduces gradients after backward"),
    ],
)
def test_other_engines_are_refused(kind: DistributedType, reason: str):
    accelerator, model, _ = make()
    accelerator.state.distributed_type = kind
    assert message(accelerator, model, items=3) == f"backward(items=...) is not supported here, since {reason}.{COUNT}"


def test_lomo_is_refused():
    accelerator, model, _ = make()
    assert "(LOMO) has no gradient to divide." in message(accelerator, model, items=3, learning_rate=0.1)


def test_means_and_sums_do_not_mix():
    accelerator, model, _ = make()
    loss, items = ref.loss_and_items(model, ref.ragged_batch(4))
    with accelerator.accumulate(model):
        accelerator.backward(loss, items=items)
    with accelerator.accumulate(model):
        assert message(accelerator, model) == (
            "this window has micro-batches with items, and this one is without items: a mean cannot be added to sums. "
            "Pass items= for every micro-batch of a window, or for none."
        )


def test_sums_and_means_do_not_mix():
    accelerator, model, _ = make()
    with accelerator.accumulate(model):
        accelerator.backward(ref.loss_mean(model, ref.ragged_batch(4)))
    with accelerator.accumulate(model):
        assert message(accelerator, model, items=3) == (
            "this window has micro-batches without items, and this one is with items: a mean cannot be added to sums. "
            "Pass items= for every micro-batch of a window, or for none."
        )


def test_two_calls_in_one_block_are_refused():
    accelerator, model, _ = make()
    loss, items = ref.loss_and_items(model, ref.ragged_batch(4))
    with accelerator.accumulate(model):
        accelerator.backward(loss, items=items)
        assert message(accelerator, model, items=items) == (
            "backward(items=...) was called twice in one block of accelerator.accumulate(), and the items of the "
            "second call may be those of the first: add up the losses, and call it once. For models that "
            "take turns, make a bigbatch.Accumulator of each."
        )


@pytest.mark.parametrize("forgets", ["zero_grad", "accumulate"])
def test_gradient_before_a_window_is_refused(forgets: str):
    accelerator, model, optimizer = make(steps=1)
    loss, items = ref.loss_and_items(model, ref.ragged_batch(4))
    accelerator.backward(loss, items=items)
    if forgets == "zero_grad":
        optimizer.step()
    assert message(accelerator, model, items=items) == (
        "the parameters have a gradient before the first micro-batch of a window, which would be divided by the items "
        "of this one: call optimizer.zero_grad() after optimizer.step(), and run all micro-batches of a window in "
        "accelerator.accumulate(model), or all but the last in accelerator.no_sync(model)."
    )
    optimizer.zero_grad(set_to_none=False)
    accelerator.backward(ref.loss_and_items(model, ref.ragged_batch(4))[0], items=items)


@pytest.mark.parametrize(
    ("items", "error", "words"),
    [
        (-3, ValueError, "are -3: they must be a finite count, 0 or more."),
        (torch.tensor(-3), ValueError, "are -3: they must be a finite count, 0 or more."),
        (float("nan"), ValueError, "are nan: they must be a finite count, 0 or more."),
        (float("inf"), ValueError, "are inf: they must be a finite count, 0 or more."),
        (torch.ones(2), ValueError, "have shape (2,): they must be one number"),
        ("3", TypeError, "are a str: they must be a number or a 0-d tensor."),
    ],
)
def test_invalid_counts_are_refused(items: Any, error: type[Exception], words: str):
    accelerator, model, _ = make()
    with pytest.raises(error) as raised:
        accelerator.backward(ref.loss_and_items(model, ref.ragged_batch(4))[0], items=items)
    assert words in str(raised.value)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_loss_must_be_a_sum():
    accelerator, model, _ = make()
    with pytest.raises(ValueError, match="it must be the 0-d sum of the item losses"):
        accelerator.backward(model(ref.ragged_batch(4)["tokens"]), items=3)
    with pytest.raises(ValueError, match="the loss of a micro-batch with 0 items is nan, a mean over nothing"):
        accelerator.backward(model(ref.ragged_batch(4)["tokens"]).sum() * float("nan"), items=0)


@pytest.mark.parametrize(("steps", "items"), [(1, 5), (3, None)])
def test_engine_loss_is_not_divided(steps: int, items: int | None):
    accelerator, model, _ = make(steps=steps)
    engine = bigbatch.Engine(model, None, ref.loss_and_items, microbatch=2, check=False)
    loss = engine.loss(ref.ragged_batch(4))
    with pytest.raises(bigbatch.InputError) as raised:
        accelerator.backward(loss, items=items)
    assert str(raised.value) == (
        "the loss of engine.loss(batch) has the finished gradient of a whole window, which must not be divided: set "
        "gradient_accumulation_steps=1, and call accelerator.backward(loss) without items."
    )


UNPREPARED = (
    "the loss reaches a parameter of shape (1,) that no prepared model has, and its gradient would neither be averaged "
    "over ranks nor divided: pass its module to accelerator.prepare(), or call requires_grad_(False) on it."
)


def test_parameters_that_were_not_prepared_are_refused():
    accelerator, model, _ = make()
    scale = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    loss, items = ref.loss_and_items(model, ref.ragged_batch(4))
    with pytest.raises(bigbatch.InputError) as raised:
        accelerator.backward((loss * scale).sum(), items=items)
    assert str(raised.value) == UNPREPARED
    assert model.head.weight.grad is None
    accelerator.prepare(torch.optim.SGD([scale], lr=0.1))
    accelerator.backward((loss * scale).sum(), items=items)


def test_parameters_outside_of_wrappers_are_refused(pools: Pools):
    assert pools(2).run(_own_parameter) == [UNPREPARED] * 2


def _own_parameter() -> str:
    with cases.fresh_state():
        accelerator = ExactAccelerator(cpu=True)
        scale = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        model = accelerator.prepare(ref.make_model())
        accelerator.prepare(torch.optim.SGD([*model.parameters(), scale], lr=0.1))
        loss, items = ref.loss_and_items(model, ref.ragged_batch(4))
        try:
            accelerator.backward((loss * scale).sum(), items=items)
        except bigbatch.InputError as error:
            return str(error)
        return ""


def test_join_of_uneven_ranks_is_refused(pools: Pools):
    reason = "ranks that run out of data in join_uneven_inputs do not take part in the count"
    assert pools(2).run(_join) == [f"backward(items=...) is not supported here, since {reason}.{COUNT}"] * 2


def _join() -> str:
    with cases.fresh_state():
        accelerator, model, _ = make()
        part = ref.ragged_batch(4)
        with accelerator.join_uneven_inputs([model], even_batches=None):
            loss, items = ref.loss_and_items(model, part)
            try:
                accelerator.backward(loss, items=items)
            except bigbatch.InputError as error:
                message = str(error)
                loss.backward()
                return message
        return ""
