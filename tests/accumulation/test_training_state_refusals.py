"""A state is refused with the reason, or loaded as a whole: nothing is changed in between."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigbatch
from bigbatch.lm.checkpoint.state_tree import copy_to_cpu, equal

optim, schedules = torch.optim, torch.optim.lr_scheduler
State = dict[str, Any]


def loss_fn(model: nn.Module, rows: Tensor) -> tuple[Tensor, int]:
    return model(rows).square().sum(), len(rows)


def rows(seed: int) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def engine_of(
    make_optimizer: Callable[[Any], Any],
    make_scheduler: Callable[[Any], Any] | None = None,
    *,
    seed: int = 0,
    scaler: Any = None,
) -> bigbatch.Engine:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    optimizer = make_optimizer([*model.parameters()])
    first = optimizer[0] if isinstance(optimizer, list) else optimizer
    scheduler = make_scheduler(first) if make_scheduler else None
    engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=2, scheduler=scheduler, scaler=scaler, check=False)
    for step in range(3):
        engine.step(rows(step))
    return engine


def refusal(engine: bigbatch.Engine, state: State) -> str:
    """Return why an engine refuses a state, after checking that it changes nothing."""
    before = copy_to_cpu(engine.state_dict())
    with pytest.raises(ValueError, match=r"\.$") as caught:
        engine.load_state_dict(state)
    assert equal(copy_to_cpu(engine.state_dict()), before)
    return str(caught.value)


def without_format(state: State) -> State:
    return {key: value for key, value in state.items() if key != "format"}


def adamw(parameters: Any) -> optim.Optimizer:
    return optim.AdamW(parameters, lr=0.1)


def momentum(parameters: Any) -> optim.Optimizer:
    return optim.SGD(parameters, lr=0.1, momentum=0.9)


# classes ----------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "AdamW": adamw,
    "Adam": lambda p: optim.Adam(p, lr=0.1),
    "SGD": momentum,
    "NAdam": lambda p: optim.NAdam(p, lr=0.1),
    "Adadelta": lambda p: optim.Adadelta(p, lr=0.1),
    "Rprop": lambda p: optim.Rprop(p, lr=0.1),
}


@pytest.mark.parametrize("with_format", [True, False], ids=["new", "old"])
@pytest.mark.parametrize("theirs", OPTIMIZERS)
@pytest.mark.parametrize("own", OPTIMIZERS)
def test_only_the_same_optimizer_class_loads(own: str, theirs: str, with_format: bool) -> None:
    engine, state = engine_of(OPTIMIZERS[own], seed=1), copy_to_cpu(engine_of(OPTIMIZERS[theirs]).state_dict())
    state = state if with_format else without_format(state)
    if own == theirs:
        engine.load_state_dict(state)
        assert equal(copy_to_cpu(engine.state_dict())["optimizer"], state["optimizer"])
    elif with_format:
        assert refusal(engine, state) == (
            f"the optimizer in the state is torch.optim.{theirs.lower()}.{theirs}, and that of this engine is "
            f"torch.optim.{own.lower()}.{own}: pass one of the same class."
        )
    elif (own, theirs) != ("Adam", "AdamW"):  # Adam with decoupled_weight_decay=True computes the same
        assert "pass an optimizer of the same class" in refusal(engine, state)


def test_settings_of_another_optimizer_are_named() -> None:
    state = without_format(engine_of(momentum).state_dict())
    assert refusal(engine_of(lambda p: optim.Rprop(p)), state) == (
        "optimizer.param_groups.0 has the settings dampening, lr, momentum, nesterov, weight_decay in the state, and "
        "the Rprop of this engine has etas, lr, step_sizes: pass an optimizer of the same class, with groups of the "
        "same settings."
    )


def test_state_of_adam_is_refused_by_adamw() -> None:
    state = without_format(engine_of(OPTIMIZERS["Adam"]).state_dict())
    assert refusal(engine_of(adamw), state) == (
        "optimizer.param_groups.0 has decoupled_weight_decay=False in the state, which is of Adam, and this engine has "
        "AdamW: pass an optimizer of the same class."
    )


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.9),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 5]),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 9),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 4),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda step: 0.9),
}


@pytest.mark.parametrize("with_format", [True, False], ids=["new", "old"])
@pytest.mark.parametrize("theirs", SCHEDULERS)
@pytest.mark.parametrize("own", SCHEDULERS)
def test_only_the_same_scheduler_class_loads(own: str, theirs: str, with_format: bool) -> None:
    engine = engine_of(momentum, SCHEDULERS[own], seed=1)
    state = copy_to_cpu(engine_of(momentum, SCHEDULERS[theirs]).state_dict())
    state = state if with_format else without_format(state)
    if own == theirs:
        engine.load_state_dict(state)
        assert engine.state_dict()["scheduler"] == state["scheduler"]
    elif with_format:
        assert refusal(engine, state) == (
            f"the scheduler in the state is torch.optim.lr_scheduler.{theirs}, and that of this engine is "
            f"torch.optim.lr_scheduler.{own}: pass one of the same class."
        )
    else:
        assert refusal(engine, state)


def test_settings_of_another_scheduler_are_named() -> None:
    state = without_format(engine_of(momentum, SCHEDULERS["ExponentialLR"]).state_dict())
    assert refusal(engine_of(momentum, lambda o: schedules.LinearLR(o)), state) == (
        "the state is of a scheduler with the settings base_lrs, gamma, last_epoch, and the LinearLR of this engine "
        "has base_lrs, end_factor, last_epoch, start_factor, total_iters: pass a scheduler of the same class."
    )


def test_class_of_a_script_loads_after_its_import() -> None:
    engine, state = engine_of(adamw, seed=1), copy_to_cpu(engine_of(adamw).state_dict())
    state["format"]["optimizers"] = ["__main__.AdamW"]
    engine.load_state_dict(state)
    state["format"]["optimizers"] = ["apex.AdamW"]
    assert "is apex.AdamW, and that of this engine is torch.optim.adamw.AdamW" in refusal(engine, state)


def test_changed_settings_become_those_of_the_state() -> None:
    one, other = engine_of(lambda p: optim.SGD(p, lr=0.3, weight_decay=0.1)), engine_of(lambda p: optim.SGD(p, lr=0.1))
    other.load_state_dict(one.state_dict())
    group = other.accumulator.update.optimizers[0].param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.1)


def test_finished_one_cycle_schedule_loads() -> None:
    one, other = (engine_of(momentum, lambda o: schedules.OneCycleLR(o, 0.1, total_steps=4), seed=s) for s in (0, 1))
    one.step(rows(3))
    with pytest.raises(bigbatch.errors.TornUpdateError):
        other.step(rows(3)), other.step(rows(4))
    other.load_state_dict(copy_to_cpu(one.state_dict()))
    assert equal(one.state_dict(), other.state_dict())


# numbers of optimizers and the order of parameters ----------------------------------------------------------------


def several(parameters: list[Any]) -> Any:
    return [optim.SGD(parameters[:2], lr=0.1, momentum=0.9), optim.AdamW(parameters[2:])]


def test_several_optimizers_resume_bit_identically() -> None:
    one, other = engine_of(several), engine_of(several, seed=1)
    state = copy_to_cpu(one.state_dict())
    assert [len(each["state"]) for each in state["optimizer"]] == [2, 4]
    other.load_state_dict(state)
    one.step(rows(5))
    other.step(rows(5))
    assert equal(one.state_dict(), other.state_dict())


def test_other_number_of_optimizers_is_refused() -> None:
    one, two = engine_of(adamw), engine_of(several)
    assert refusal(two, one.state_dict()) == (
        "this engine has 2 optimizers, and the state is of one with 1: use as many."
    )
    assert refusal(one, two.state_dict()) == (
        "this engine has 1 optimizers, and the state is of one with 2: use as many."
    )


def test_other_order_of_parameters_is_refused() -> None:
    one, other = engine_of(adamw), engine_of(lambda parameters: adamw([parameters[0], *parameters[:0:-1]]))
    assert refusal(other, one.state_dict()) == (
        "parameter 1 of the optimizer is 0.bias in the state and 2.bias in this engine: make the optimizer with the "
        "same parameters in the same order."
    )


# formats -----------------------------------------------------------------------------------------------------------


def test_state_of_a_newer_version_is_refused() -> None:
    engine = engine_of(adamw)
    state = engine.state_dict()
    newer = {**state, "format": {**state["format"], "version": 3}, "something": 1}
    assert refusal(engine, newer) == (
        "the state has the format 3, and this version of bigbatch knows formats up to 2: update bigbatch to the "
        "version that captured it."
    )
    assert refusal(engine, {**state, "epoch": 1}) == (
        "the state has the unknown key epoch: remove what was added to it, or update bigbatch to the version that "
        "captured it."
    )


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda s: s.pop("random"), "it lacks random"),
        (lambda s: s["engine"].update(num_steps=2.0), "engine.num_steps is 2.0, not a whole number"),
        (lambda s: s["optimizer"]["state"][3].pop("exp_avg_sq"), "optimizer.state.3 lacks exp_avg_sq"),
        (lambda s: s["optimizer"]["state"][2].update(step=torch.tensor(-1.0)), "optimizer.state.2.step is -1.0, and"),
        (lambda s: s["optimizer"]["state"].update({9: {}}), "optimizer.state has an entry 9, and the parameters are 0"),
        (lambda s: s["optimizer"]["param_groups"][0].update(lr=None), "optimizer.param_groups.0.lr is None, not a"),
        (lambda s: s["optimizer"]["param_groups"][0].update(betas=(0.9, 1.5)), "0 is refused by AdamW (Invalid beta"),
        (lambda s: s["scheduler"].update(step_size=0), "scheduler.step_size is 0, and cannot be below 1"),
        (lambda s: s["scheduler"].update(gamma=torch.zeros(2)), "scheduler.gamma is a float32 tensor of the shape [2]"),
    ],
    ids=range(9),
)
def test_damaged_state_names_the_place(edit: Callable[[State], Any], problem: str) -> None:
    engine = engine_of(adamw, lambda o: schedules.StepLR(o, 2))
    state = copy.deepcopy(engine.state_dict())
    edit(state)
    message = refusal(engine, state)
    assert message.startswith("the state is damaged: ")
    assert problem in message
    assert message.endswith(". Load a state as Engine.state_dict() returned it; nothing is changed.")


def test_complex_moments_are_refused_for_real_parameters() -> None:
    engine = engine_of(adamw)
    state = copy.deepcopy(engine.state_dict())
    state["optimizer"]["state"][4]["exp_avg"] = torch.zeros(2, 4, dtype=torch.complex128)
    assert refusal(engine, state) == (
        "optimizer.state.4.exp_avg is complex in the state, not floating point: no value can be converted."
    )


# errors while writing ----------------------------------------------------------------------------------------------


class Fragile(optim.SGD):
    """Fails at the end of loading, when it has changed everything."""

    error: BaseException | None = None

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        if self.error is not None:
            self.scale = 2.0
            raise self.error


@pytest.mark.parametrize("error", [KeyError("scale"), KeyboardInterrupt(), torch.OutOfMemoryError("out of memory")])
def test_failed_load_restores_the_state(error: BaseException) -> None:
    engine, state = (engine_of(lambda p: Fragile(p, lr=0.1, momentum=0.9), seed=s) for s in (0, 1))
    optimizer = engine.accumulator.update.optimizers[0]
    before, groups = copy_to_cpu(engine.state_dict()), optimizer.param_groups
    optimizer.error = error
    expected = ValueError if isinstance(error, KeyError) else type(error)
    with pytest.raises(expected) as caught:
        engine.load_state_dict(state.state_dict())
    if isinstance(error, KeyError):
        assert str(caught.value) == (
            "Fragile cannot load its state (KeyError: 'scale'). Nothing is changed: use the class and the settings "
            "that the state was captured with."
        )
    assert equal(copy_to_cpu(engine.state_dict()), before)
    assert optimizer.param_groups is groups
    assert not hasattr(optimizer, "scale")
    assert engine.step(rows(9)).step == 4


@pytest.mark.parametrize("failing", [0, 3, 8])
def test_interrupted_copy_restores_every_tensor(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    scheduler = SCHEDULERS["MultiStepLR"]
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for scale in (4.0, 32.0)]
    engine, other = (engine_of(momentum, scheduler, seed=s, scaler=scalers[s]) for s in (0, 1))
    state, before = copy_to_cpu(other.state_dict()), copy_to_cpu(engine.state_dict())
    copy_tensor, calls = Tensor.copy_, iter(range(1000))

    def interrupted(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if next(calls) == failing:
            raise KeyboardInterrupt
        return copy_tensor(self, source, non_blocking)

    monkeypatch.setattr(Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.load_state_dict(state)
    monkeypatch.undo()
    assert equal(copy_to_cpu(engine.state_dict()), before)
    engine.load_state_dict(state)
    assert equal(copy_to_cpu(engine.state_dict()), state)


def test_failed_load_leaves_torn_update_torn(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(state: State) -> None:
        raise OSError("no memory")

    def broken_schedule(step: int) -> float:
        if step == 4:
            raise OSError("no schedule")
        return 1.0

    engine = engine_of(momentum, lambda o: schedules.LambdaLR(o, broken_schedule))
    state = copy.deepcopy(engine.state_dict())
    with pytest.raises(bigbatch.errors.TornUpdateError):
        engine.step(rows(3))
    damaged = {**state, "random": {**state["random"], "cpu": state["random"]["cpu"][:-1]}}
    with pytest.raises(ValueError, match="the random state cpu is not one of its generator"):
        engine.load_state_dict(damaged)
    monkeypatch.setattr(engine.accumulator.update.optimizers[0], "load_state_dict", fail)
    with pytest.raises(OSError, match="no memory"):
        engine.load_state_dict(state)
    monkeypatch.undo()
    with pytest.raises(bigbatch.errors.TornUpdateError):
        engine.step(rows(4))
    engine.load_state_dict(state)
    assert equal(copy_to_cpu(engine.state_dict()), state)


# precision ---------------------------------------------------------------------------------------------------------


class WideMoments(optim.Optimizer):
    """Keeps float32 averages of bfloat16 parameters."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            average = self.state[p].setdefault("average", torch.zeros_like(p, dtype=torch.float32))
            p.sub_(0.1 * average.lerp_(p.grad.float(), 0.3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make_optimizer", [WideMoments, optim.NAdam, optim.ASGD], ids=lambda kind: kind.__name__)
def test_state_keeps_its_dtype(make_optimizer: Callable[[Any], optim.Optimizer], dtype: torch.dtype) -> None:
    def resumed(seed: int) -> bigbatch.Engine:
        torch.manual_seed(seed)
        model = nn.Linear(4, 2).to(dtype)
        return bigbatch.Engine(model, make_optimizer([*model.parameters()]), loss_fn, microbatch=2, noise=False)

    one, other = resumed(0), resumed(1)
    for step in range(3):
        one.step(rows(step).to(dtype))
    state = copy_to_cpu(one.state_dict())
    other.load_state_dict(state)
    assert equal(copy_to_cpu(other.state_dict()), state)
    for engine in (one, other):
        engine.step(rows(3).to(dtype))
    assert equal(one.state_dict(), other.state_dict())


def test_state_inside_window_is_refused() -> None:
    engine = engine_of(adamw)
    state = copy.deepcopy(engine.state_dict())
    window = engine.accumulator.window()
    window.backward(engine.model(rows(7)).square().sum(), items=6)
    for call, use in {
        "state_dict": engine.state_dict,
        "load_state_dict": lambda: engine.load_state_dict(state),
    }.items():
        with pytest.raises(bigbatch.WindowStateError) as caught:
            use()
        assert str(caught.value) == (
            f"{call}() was called while a window holds gradients, which no state contains. Call it between two "
            "windows: after window.step() or window.abort(), and not inside loss_fn."
        )
    window.abort()
    engine.load_state_dict(state)


def test_loss_function_cannot_capture_state() -> None:
    states: list[State] = []

    def capturing(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        if len(batch) == 1:  # the last micro-batch
            states.append(engine.state_dict())
        return loss_fn(model, batch)

    model = nn.Linear(4, 2).double()
    engine = bigbatch.Engine(model, optim.SGD(model.parameters()), capturing, microbatch=2, check=False)
    with pytest.raises(bigbatch.WindowStateError, match=r"^state_dict\(\) was called while a window"):
        engine.step(rows(0)[:5])
    assert not states
    assert engine.state_dict()["engine"]["num_steps"] == 0
