"""What an engine is between two windows: taken, put back, and gone on with to the last bit; or refused, unchanged."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from bigbatch.errors import NonFiniteError, WindowAbandonedError
from bigbatch.lm.checkpoint.json_values import to_json
from bigbatch.lm.checkpoint.state_tree import copy_to_cpu, equal, join_tensors, split_tensors

Batch = tuple[Tensor, Tensor]


def small_model(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Tanh(), nn.Linear(width, 1))


def loss_fn(model: nn.Module, microbatch: Batch) -> tuple[Tensor, int]:
    inputs, labels = microbatch
    return F.mse_loss(model(inputs), labels, reduction="sum"), labels.numel()


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.05, fused=True)


def an_engine(
    *,
    make_optimizer: Callable[..., torch.optim.Optimizer] = adamw,
    width: int = 6,
    num_groups: int = 2,
    scheduled: bool = True,
    scaled: bool = False,
    seed: int = 0,
    **settings: Any,
) -> bigbatch.Engine:
    torch.manual_seed(seed)
    model = small_model(width)
    parameters = list(model.parameters())
    groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]
    optimizer = make_optimizer(groups if num_groups == 2 else parameters)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20) if scheduled else None
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3, enabled=scaled)
    return bigbatch.Engine(
        model,
        optimizer,
        **{"loss_fn": loss_fn, "microbatch": 3, "max_grad_norm": 1.0} | settings,
        scheduler=scheduler,
        scaler=scaler,
        check=False,
    )


def batches(count: int, *, first: int = 0) -> list[Batch]:
    made = [torch.Generator().manual_seed(number) for number in range(first, first + count)]
    return [(torch.randn(8, 5, generator=g), torch.randn(8, 1, generator=g)) for g in made]


def in_memory(state: dict[str, Any]) -> Any:
    return copy_to_cpu(state)


def through_files(state: dict[str, Any]) -> Any:
    """As a checkpoint does it: no pickle anywhere."""
    values, tensors = split_tensors(state)
    return join_tensors(json.loads(to_json("state", values)), {place: t.clone() for place, t in tensors.items()})


# going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("carry", [in_memory, through_files])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "make_optimizer",
    [
        adamw,
        lambda groups: torch.optim.Adam(groups, lr=0.05, amsgrad=True),
        lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
        lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True),
        lambda groups: torch.optim.Adafactor(groups, lr=0.05),
        lambda groups: torch.optim.NAdam(groups, lr=0.05),
        lambda groups: torch.optim.ASGD(groups, lr=0.05),
        lambda groups: torch.optim.Rprop(groups, lr=0.05),
    ],
    ids=["AdamW", "Adam", "SGD", "RMSprop", "Adafactor", "NAdam", "ASGD", "Rprop"],
)
def test_another_engine_resumes_bit_identically(
    make_optimizer: Callable[..., torch.optim.Optimizer], scaled: bool, carry: Callable[[Any], Any]
) -> None:
    one = an_engine(make_optimizer=make_optimizer, scaled=scaled)
    for batch in batches(4):
        one.step(batch)
    state = carry(one.state_dict())
    reports = [one.step(batch) for batch in batches(4, first=4)]

    other = an_engine(make_optimizer=make_optimizer, scaled=scaled, seed=1)
    other.load_state_dict(state)
    again = [other.step(batch) for batch in batches(4, first=4)]
    assert [(r.step, r.loss, r.grad_norm) for r in again] == [(r.step, r.loss, r.grad_norm) for r in reports]
    assert again[-1].step == 8
    assert equal(one.state_dict(), other.state_dict())
    assert equal(one.model.state_dict(), other.model.state_dict()), "statistics of batch norm are state as well"


def test_loaded_state_is_unchanged_and_reloadable() -> None:
    engine = an_engine()
    engine.step(batches(1)[0])
    state = copy_to_cpu(engine.state_dict())
    expected = copy_to_cpu(state)
    for _ in range(2):
        engine.load_state_dict(state)
        assert equal(engine.state_dict(), expected)
        engine.step(batches(1, first=1)[0])
        assert equal(state, expected), "the step has written to the state that was loaded"


def test_state_before_first_window_resumes() -> None:
    one, other = an_engine(), an_engine(seed=1)
    state = copy_to_cpu(one.state_dict())
    one.step(batches(1)[0])
    other.load_state_dict(state)
    other.step(batches(1)[0])
    assert equal(one.state_dict(), other.state_dict())


def test_reduced_microbatch_after_oom_is_saved_in_state() -> None:
    one, other = an_engine(microbatch=8), an_engine(microbatch=8, seed=1)
    one.microbatch_size.observe(retries=1)
    other.load_state_dict(through_files(one.state_dict()))
    assert [len(rows) for rows in other.groups([1] * 8)] == [7, 1]


def test_own_microbatch_survives_load_with_equal_update() -> None:
    engines = [an_engine(microbatch=size, seed=size) for size in (8, 3)]
    for engine in engines:
        engine.model.double().eval()
    one, other = engines
    double = [(inputs.double(), labels.double()) for inputs, labels in batches(2)]
    one.step(double[0])
    other.load_state_dict(copy_to_cpu(one.state_dict()))
    assert other.microbatch_size.current == 3
    one.step(double[1])
    other.step(double[1])
    for name, parameter in one.model.named_parameters():
        assert torch.allclose(parameter, other.model.get_parameter(name), rtol=1e-12, atol=0)


# refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 7}, r"has the shape \[6, 5\] in the state, not \[7, 5\]\."),
        ({"num_groups": 1}, r"groups of \[2, 4\] parameters, and this one has \[6\]: use the same"),
        ({"scheduled": False}, r"this engine has no scheduler, and the state is of one with one: use the same"),
        ({"scaled": True}, r"this engine has a scaler, and the state is of one with none: use the same"),
    ],
    ids=str,
)
def test_state_of_another_kind_is_rejected_unchanged(change: dict[str, Any], message: str) -> None:
    one, other = an_engine(), an_engine(seed=1, **change)
    one.step(batches(1)[0])
    other.step(batches(1)[0])
    before = copy_to_cpu(other.state_dict())
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(one.state_dict())
    assert equal(other.state_dict(), before)


@pytest.mark.parametrize("missing", [True, False])
def test_state_with_other_tensor_count_is_rejected_unchanged(missing: bool) -> None:
    engine = an_engine()
    before = copy_to_cpu(engine.state_dict())
    state = copy_to_cpu(before)
    if missing:
        del state["model"]["4.bias"]
    else:
        state["model"]["5.weight"] = torch.zeros(1)
    said = r"lacks 1 tensors of this model, such as 4\.bias" if missing else "this model lacks, such as 5.weight"
    with pytest.raises(ValueError, match=said):
        engine.load_state_dict(state)
    assert equal(engine.state_dict(), before)


# windows that change nothing -------------------------------------------------------------------------------------


class _PoisonedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.nan


def poisoned(where: str) -> Callable[..., tuple[Tensor, int]]:
    """A loss that is not finite, or whose gradient is not, in the micro-batch that has a label of 1,000."""

    def poisoned_loss(model: nn.Module, microbatch: Batch) -> tuple[Tensor, int]:
        loss_sum, items = loss_fn(model, microbatch)
        if not (microbatch[1] == 1000).any():
            return loss_sum, items
        return (loss_sum + torch.nan if where == "loss" else _PoisonedBackward.apply(loss_sum)), items

    return poisoned_loss


def with_poison(batch: Batch) -> Batch:
    inputs, labels = batch
    labels = labels.clone()
    labels[4] = 1000.0
    return inputs, labels


def learned(engine: bigbatch.Engine) -> dict[str, Any]:
    """Parameters, optimizer state, schedule and count: what an update changes."""
    state = engine.state_dict()
    parameters = dict(engine.model.named_parameters())
    return {
        "parameters": {name: p.detach() for name, p in parameters.items()},
        "optimizer": state["optimizer"],
        "scheduler": state["scheduler"],
        "num_steps": state["engine"]["num_steps"],
    }


@pytest.mark.parametrize("first", [True, False], ids=["first window", "later window"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nonfinite_microbatch_skips_whole_window(where: str, first: bool) -> None:
    engine = an_engine(loss_fn=poisoned(where))
    if first:
        engine.accumulator.prepare()
    else:
        engine.step(batches(1)[0])
    before = copy_to_cpu(learned(engine))
    report = engine.step(with_poison(batches(1, first=1)[0]))
    assert report.skipped == f"non-finite {where}"
    assert report.num_microbatches == 3
    assert math.isfinite(report.loss) == (where == "gradient")
    assert equal(learned(engine), before)
    assert all(parameter.grad is None for parameter in engine.model.parameters())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_run_continues_as_without_skipped_window(where: str) -> None:
    skipping, plain = an_engine(loss_fn=poisoned(where)), an_engine()
    for engine in (skipping, plain):  # statistics and dropout go on in a window that is skipped
        engine.model.eval()
    first, second, third = batches(3)
    for batch in (first, with_poison(second), third):
        skipping.step(batch)
    for batch in (first, third):
        plain.step(batch)
    assert equal(learned(skipping), learned(plain))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nonfinite_window_raises_on_request_and_changes_nothing(where: str) -> None:
    engine = an_engine(loss_fn=poisoned(where), nonfinite="raise")
    engine.step(batches(1)[0])
    before = copy_to_cpu(learned(engine))
    with pytest.raises(NonFiniteError, match=rf"the window after update 1 has a non-finite {where}, and changed"):
        engine.step(with_poison(batches(1, first=1)[0]))
    assert equal(learned(engine), before)
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    assert engine.step(batches(1, first=2)[0]).skipped is None


def test_scaler_backs_off_when_window_is_skipped() -> None:
    engine = an_engine(loss_fn=poisoned("gradient"), scaled=True)
    engine.step(batches(1)[0])
    before = copy_to_cpu(learned(engine))
    assert engine.step(with_poison(batches(1, first=1)[0])).skipped == "non-finite gradient"
    assert engine.state_dict()["scaler"]["scale"] == 4.0
    assert equal(learned(engine), before)


def test_abandoned_window_changes_nothing() -> None:
    engine = an_engine()
    engine.step(batches(1)[0])
    before = copy_to_cpu(learned(engine))
    asked = iter([False, False, True])
    with pytest.raises(WindowAbandonedError, match="the window was abandoned before its micro-batch 3 of 3"):
        engine.step(batches(1, first=1)[0], should_abandon=lambda: next(asked))
    assert equal(learned(engine), before)
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    assert engine.step(batches(1, first=1)[0]).step == 2
