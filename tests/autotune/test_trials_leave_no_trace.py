"""Choosing the micro-batch and predicting its memory leave the model, the loss and all generators as they were."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigbatch import Engine
from bigbatch.autotune import choice as choice_module
from bigbatch.autotune import probe
from bigbatch.autotune.peak_prediction import PeakPredictor
from support.stateful_models import (
    KINDS,
    WIDTH,
    ClassCounter,
    HiddenState,
    Nested,
    OwnGenerators,
    Stateful,
    content,
    describe,
    loss_fn,
    rows,
)
from support.tiers import slow, slow_except


@pytest.fixture(autouse=True)
def _time_briefly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(probe, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(choice_module, "MAX_PROBING_S", float("inf"))
    calls, sizes = ClassCounter.calls, list(ClassCounter.sizes)
    yield
    ClassCounter.calls, ClassCounter.sizes[:] = calls, sizes


def engine_of(model: nn.Module, loss: Any = loss_fn, **settings: Any) -> Engine:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Engine(model, torch.optim.Adam(trained, lr=0.1), loss, check=False, **settings)


def lengths_of(batch: list[Tensor]) -> list[int]:
    return [2 + index % 3 for index in range(len(batch))]


SETTINGS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "tensors": (rows, {}),
    "memory": (lambda: rows(5).double().float(), {"memory": "90%"}),
    "lists": (lambda: list(rows(6)), {"collate": torch.stack}),
    "lengths": (lambda: list(rows(6)), {"collate": torch.stack, "lengths": lengths_of}),
    "tensors with lengths": (lambda: rows(6), {"lengths": lengths_of}),
}


@pytest.mark.parametrize("settings", slow_except(SETTINGS, "tensors", "lengths"))
@pytest.mark.parametrize("kind", KINDS)
def test_tuning_leaves_no_trace_of_any_state(kind: type[Stateful], settings: str) -> None:
    batch, options = SETTINGS[settings]
    model = kind()
    engine = engine_of(model, **options)
    engine.accumulator.prepare()
    before = describe(model)
    engine.tune(batch())
    assert describe(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_first_auto_step_equals_step_of_fixed_size(kind: type[Stateful]) -> None:
    start = ClassCounter.calls, list(ClassCounter.sizes)
    model = kind()
    engine = engine_of(model, microbatch="auto")
    report = engine.step(rows())
    after = content(model)
    ClassCounter.calls, ClassCounter.sizes[:] = start
    assert engine.choice is not None
    twin = kind()
    assert engine_of(twin, microbatch=engine.choice.size).step(rows()).loss == report.loss
    assert content(twin) == after


def test_hidden_state_with_graph_is_predicted() -> None:
    engine = engine_of(HiddenState())
    assert engine.tune(rows()).prediction_failure is None
    engine = engine_of(OwnGenerators())
    assert "cannot be copied" not in str(engine.tune(rows()).prediction_failure)


def test_batch_in_one_tensor_is_predicted() -> None:
    """A slice has the storage of the whole batch, which is no memory of the micro-batch."""
    model = nn.Linear(1000, 1)
    choice = engine_of(model).tune(torch.randn(500, 1000))
    assert choice.prediction_failure is None


class Criterion(nn.Module):
    """A criterion with learned weights, a running scale and a log."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("scale", torch.ones(()))
        self.log: list[int] = []
        self.last: Any = None

    def forward(self, outputs: Tensor) -> Tensor:
        self.scale.mul_(0.9).add_(outputs.detach().square().mean())
        self.last = outputs.detach().mean()
        self.log.append(len(outputs))
        return (outputs * self.weights / self.scale).square().sum()


GLOBAL_CRITERION = Criterion()


def with_global_criterion(model: nn.Module, part: Tensor) -> tuple[Tensor, int]:
    return GLOBAL_CRITERION(model(part)), len(part)


@pytest.mark.parametrize("place", ["closure", "global"])
def test_criterion_of_loss_function_is_restored(place: str) -> None:
    criterion = Criterion() if place == "closure" else GLOBAL_CRITERION
    model = nn.Linear(WIDTH, WIDTH)
    in_closure = lambda model, part: (criterion(model(part)), len(part))  # noqa: E731
    loss = in_closure if place == "closure" else with_global_criterion
    criterion.weights.grad = gradient = torch.ones(WIDTH)
    optimizer = torch.optim.SGD([*model.parameters(), criterion.weights], lr=0.1)
    before = describe(criterion)  # type: ignore[arg-type]
    Engine(model, optimizer, loss).tune(rows())
    assert describe(criterion) == before  # type: ignore[arg-type]
    assert criterion.weights.grad is gradient
    assert gradient.tolist() == [1] * WIDTH


def test_loss_on_another_reference_to_model_leaves_no_trace() -> None:
    model = Nested()

    def closed(_model: nn.Module, part: Tensor) -> tuple[Tensor, int]:
        return loss_fn(model, part)

    before = describe(model)
    choice = engine_of(model, closed).tune(rows())
    assert choice.prediction_failure == (
        "loss_fn does not use the model that it is passed, or no parameter of it that is trained"
    )
    assert describe(model) == before


def test_prediction_alone_leaves_no_trace() -> None:
    model = Nested()
    before = describe(model)
    for loss in (loss_fn, lambda copied, part: loss_fn(copied, part + model.moved(part))):
        predictor = PeakPredictor.from_training(model, torch.optim.SGD(model.parameters(), lr=0.1), loss)
        assert predictor.predict(rows()).peak_bytes == predictor.predict(rows()).peak_bytes
        assert describe(model) == before


class Everything(Stateful):
    """Several kinds of state, dropout, and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([kind() for kind in KINDS])
        self.norm = nn.BatchNorm1d(WIDTH)

    def moved(self, rows: Tensor) -> Any:
        moved = sum(part.moved(rows) for part in self.parts)
        return self.norm(torch.cat([rows, -rows]))[: len(rows)] + nn.functional.dropout(moved, 0.5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, slow(ZeroDivisionError)])
def test_error_in_any_trial_leaves_no_trace(error: type[BaseException]) -> None:
    model = Everything()
    before, generator = describe(model), torch.get_rng_state()
    gradients = [copy.copy(parameter.grad) for parameter in model.parameters()]
    calls = failing = 0

    def fails(model: nn.Module, part: Tensor) -> tuple[Tensor, int]:
        nonlocal calls
        calls += 1
        result = loss_fn(model, part)
        if calls == failing:
            raise error
        return result

    engine = engine_of(model, fails)
    num_raised = 0
    while failing <= calls:  # ends when the call that would fail is not reached
        calls, failing = 0, failing + 1
        try:
            engine.tune(rows(2))
        except error:
            num_raised += 1
        assert describe(model) == before
        assert torch.equal(torch.get_rng_state(), generator)
        assert [parameter.grad for parameter in model.parameters()] == gradients
    assert num_raised >= 6
