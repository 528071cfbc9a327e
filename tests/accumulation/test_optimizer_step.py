"""Optimizers and schedulers of an update: several, with closures, wrapped, failing half-way, interrupted."""

import copy
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bigbatch
from bigbatch.accumulation.pending_update import WindowState
from bigbatch.accumulation.step_evidence import StepSnapshot
from bigbatch.errors import TornUpdateError, WindowStateError

DOUBLE = torch.float64


def make_model(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def make_batch(samples: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(samples, 5, generator=generator, dtype=DOUBLE), torch.randint(3, (samples,), generator=generator)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="sum"), len(labels)


def values(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def mean_loss_backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss_sum, items = loss_fn(model, batch)
    loss = loss_sum / items
    loss.backward()
    return loss


# several optimizers


def split_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.03)]


@pytest.mark.parametrize("microbatch", [3, 10])
def test_several_optimizers_step_from_one_gradient(microbatch: int):
    batch = make_batch()
    expected, actual = make_model(), make_model()
    by_hand = split_optimizers(expected)
    engine = bigbatch.Engine(actual, split_optimizers(actual), loss_fn, microbatch=microbatch, max_grad_norm=0.1)
    for _ in range(3):
        mean_loss_backward(expected, batch)
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        for optimizer in by_hand:
            optimizer.step()
            optimizer.zero_grad()
        engine.step(batch)
    assert torch.allclose(values(actual), values(expected), rtol=1e-10, atol=1e-12)


def test_each_scheduler_steps_once_per_update():
    model = make_model()
    optimizers = split_optimizers(model)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in optimizers]
    engine = bigbatch.Engine(model, optimizers, loss_fn, microbatch=4, scheduler=schedulers)
    engine.step(make_batch())
    engine.step(make_batch())
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [0.005, 0.0075]


AHEAD = (
    r"^StepLR\.step\(\) was called by other code since the last update, and each update calls it: the schedule is ahead"
)


def scheduled_engine():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    return bigbatch.Engine(model, optimizer, loss_fn, microbatch=4, scheduler=scheduler), scheduler


def test_foreign_step_of_a_scheduler_is_warned_of_once():
    engine, scheduler = scheduled_engine()
    engine.step(make_batch())
    scheduler.step()
    with pytest.warns(UserWarning, match=AHEAD):
        engine.step(make_batch())
    scheduler.step()
    engine.step(make_batch())  # warnings are errors


def test_loaded_schedule_is_no_foreign_step():
    engine, scheduler = scheduled_engine()
    for _ in range(3):
        engine.step(make_batch())
        state = copy.deepcopy(engine.state_dict())
    earlier, _ = scheduled_engine()
    for _ in range(2):
        earlier.step(make_batch())
    earlier.load_state_dict(state)
    earlier.step(make_batch())
    assert scheduler.last_epoch == 3


def test_several_optimizers_resume_bit_identically():
    batch = make_batch()
    first, second = make_model(), make_model(2)
    before = bigbatch.Engine(first, split_optimizers(first), loss_fn, microbatch=4)
    before.step(batch)
    after = bigbatch.Engine(second, split_optimizers(second), loss_fn, microbatch=4)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    before.step(batch)
    after.step(batch)
    assert torch.equal(values(first), values(second))


def test_auto_chooses_microbatch_for_several_optimizers():
    model = make_model().float()
    engine = bigbatch.Engine(model, split_optimizers(model), loss_fn, microbatch="auto")
    inputs, labels = make_batch(32)
    report = engine.step((inputs.float(), labels))
    assert report.items == 32


def test_shared_parameter_between_optimizers_is_rejected():
    model = make_model()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.Adam(list(model.parameters())[2:3])]
    with pytest.raises(ValueError, match=r"^optimizers 0 and 1 \(SGD and Adam\) contain the same parameter of shape "):
        bigbatch.Accumulator(model, optimizers)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_parameter_twice_in_one_optimizer_is_rejected():
    model = make_model()
    optimizer = torch.optim.SGD([*model.parameters(), model[0].weight], lr=0.1)
    with pytest.raises(ValueError, match="twice: each update would change it twice") as caught:
        bigbatch.Accumulator(model, optimizer)
    assert str(caught.value) == (
        "the optimizer (SGD) contains the same parameter of shape (8, 5) twice: each update would change it twice. "
        "Pass each one once, for tied weights list(dict.fromkeys(parameters))."
    )


def test_empty_list_of_optimizers_is_rejected():
    with pytest.raises(ValueError, match=r"^optimizer is an empty list: pass at least one torch\.optim\.Optimizer\.$"):
        bigbatch.Accumulator(make_model(), [])


# optimizers that need a closure


class SharpnessAware(torch.optim.Optimizer):
    """SAM: the gradient of the update is computed at a point of higher loss nearby."""

    def __init__(self, params: Any, rho: float = 0.05, lr: float = 0.1) -> None:
        super().__init__(params, {"rho": rho, "lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is not None, "sharpness-aware minimization requires a closure"
        group = self.param_groups[0]
        trained = [p for p in group["params"] if p.grad is not None]
        scale = group["rho"] / torch.nn.utils.get_total_norm([p.grad for p in trained])
        moves = [p.grad * scale for p in trained]
        torch._foreach_add_(trained, moves)
        closure()
        torch._foreach_sub_(trained, moves)
        torch._foreach_add_(trained, [p.grad for p in trained], alpha=-group["lr"])


class StrictlySharpnessAware(SharpnessAware):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        super().step(closure)


@pytest.mark.parametrize("kind", [SharpnessAware, StrictlySharpnessAware])
@pytest.mark.parametrize("microbatch", [1, 4, 10])
def test_closure_runs_the_whole_window_again(kind: type[SharpnessAware], microbatch: int):
    batch = make_batch()
    expected, actual = make_model(), make_model()
    by_hand = kind(expected.parameters())
    engine = bigbatch.Engine(actual, kind(actual.parameters()), loss_fn, microbatch=microbatch)
    for _ in range(2):
        mean_loss_backward(expected, batch)

        def closure() -> Tensor:
            by_hand.zero_grad()
            with torch.enable_grad():
                return mean_loss_backward(expected, batch)

        by_hand.step(closure)
        by_hand.zero_grad()
        report = engine.step(batch)
    assert torch.allclose(values(actual), values(expected), rtol=0, atol=1e-14)
    assert report.items == 10
    assert report.num_microbatches == -(-10 // microbatch)


@pytest.mark.parametrize("kind", [SharpnessAware, StrictlySharpnessAware])
def test_window_without_its_microbatches_rejects_closure(kind: type[SharpnessAware]):
    model = make_model()
    before = values(model)
    accumulator = bigbatch.Accumulator(model, kind(model.parameters()))
    window = accumulator.window()
    window.backward(*loss_fn(model, make_batch())[:1], items=10)
    message = (
        f"{kind.__name__}.step() needs a closure that computes the gradient again, and the micro-batches of this "
        "window are no longer available. Use bigbatch.Engine in a single process and without cuda_graphs, which runs "
        "the window again, or another optimizer."
    )
    with pytest.raises(TypeError) as caught:
        window.step()
    assert str(caught.value) == message
    assert torch.equal(values(model), before)
    assert window.state is WindowState.ABORTED
    assert accumulator.num_steps == 0


# steps that do nothing, and steps that others call


class Wrapper(torch.optim.Optimizer):
    """Steps the inner optimizer only at every second call, as wrappers for accumulation do."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.calls = 0

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        if self.calls % 2 == 0:
            self.optimizer.step()


class WritesThroughData(torch.optim.Optimizer):
    """Plain SGD on ``p.data``, which changes no version."""

    def __init__(self, params: Any, lr: float = 0.1, *, idle: bool = False) -> None:
        super().__init__(params, {"lr": lr})
        self.idle = idle
        self.wrapped: torch.optim.Optimizer | None = None

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.idle:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"])


def test_wrapped_optimizer_that_does_not_step_raises():
    model = make_model()
    accumulator = bigbatch.Accumulator(model, Wrapper(torch.optim.SGD(model.parameters(), lr=0.1)))
    window = accumulator.window()
    window.backward(loss_fn(model, make_batch())[0], items=10)
    message = (
        "Wrapper.step() (a wrapper of SGD) returned without an update: no parameter changed. A window needs an "
        "optimizer that steps at every call: pass the optimizer itself instead of its wrapper, and do not run windows "
        "inside accelerator.accumulate()."
    )
    with pytest.raises(WindowStateError) as caught:
        window.step()
    assert str(caught.value) == message
    assert accumulator.num_steps == 0
    window = accumulator.window()
    window.backward(loss_fn(model, make_batch())[0], items=10)
    assert window.step().step == 1


def test_optimizer_that_never_writes_raises():
    model = make_model()
    engine = bigbatch.Engine(model, WritesThroughData(model.parameters(), idle=True), loss_fn, microbatch=4)
    with pytest.raises(WindowStateError, match=r"^WritesThroughData\.step\(\) returned without an update: no "):
        engine.step(make_batch())


@pytest.mark.parametrize("settings", [{}, {"lr": 0.1}], ids=["without rate", "into an attribute"])
def test_optimizer_may_only_read_gradients(settings: dict[str, float]):
    class GradientLog(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            self.seen = torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]])

    model = make_model()
    optimizer = GradientLog(model.parameters(), settings)
    report = bigbatch.Engine(model, optimizer, loss_fn, microbatch=4).step(make_batch())
    assert report.step == 1
    mean_loss_backward(model, make_batch())
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(optimizer.seen, expected, rtol=0, atol=1e-15)


def test_optimizer_that_writes_through_data_is_accepted():
    batch = make_batch()
    expected, actual = make_model(), make_model()
    engine = bigbatch.Engine(actual, WritesThroughData(actual.parameters()), loss_fn, microbatch=3)
    for _ in range(3):
        mean_loss_backward(expected, batch)
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        engine.step(batch)
    assert torch.allclose(values(actual), values(expected), rtol=0, atol=1e-14)


def test_new_state_does_not_make_writes_visible():
    """As of lists of sharded tensors: the first step adds state, and no step changes a version."""

    class Momentum(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                    average.data.add_(parameter.grad)
                    parameter.data.sub_(group["lr"] * average.data)

    model = make_model()
    engine = bigbatch.Engine(model, Momentum(model.parameters(), {"lr": 0.1}), loss_fn, microbatch=4)
    assert [engine.step(make_batch()).step for _ in range(3)] == [1, 2, 3]


def test_step_on_lists_within_dispatch_mode_is_seen():
    class Passing(TorchDispatchMode):
        """Changes nothing; within it, operations on lists of tensors change no version."""

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    class OnLists(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                torch._foreach_add_(group["params"], [p.grad for p in group["params"]], alpha=-0.1)

    model = make_model()
    engine = bigbatch.Engine(model, OnLists(model.parameters(), {}), loss_fn, microbatch=4)
    engine.step(make_batch())
    with Passing():
        assert engine.step(make_batch()).step == 2


@pytest.mark.parametrize("first", [0, 0.5])
def test_optimizer_that_steps_every_second_time_raises(first: float):
    class Accumulating(WritesThroughData):
        """Accumulates on its own: a second accumulation inside that of the window."""

        def step(self, closure: Any = None) -> None:
            self.num_calls = getattr(self, "num_calls", first) + 1
            self.idle = self.num_calls < 2
            super().step()

    model = make_model()
    before = values(model).clone()
    engine = bigbatch.Engine(model, Accumulating(model.parameters()), loss_fn, microbatch=4)
    with pytest.raises(WindowStateError, match=r"^Accumulating\.step\(\) returned without an update: no "):
        engine.step(make_batch())
    assert torch.equal(values(model), before)
    assert engine.accumulator.num_steps == 0


def test_wrapper_that_counts_its_calls_still_raises():
    class CountingWrapper(WritesThroughData):
        def step(self, closure: Any = None) -> None:
            self.num_calls = getattr(self, "num_calls", 0) + 1

    model = make_model()
    optimizer = CountingWrapper(model.parameters())
    optimizer.wrapped = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(WindowStateError, match=r"^CountingWrapper\.step\(\) returned without an update: no "):
        bigbatch.Engine(model, optimizer, loss_fn, microbatch=4).step(make_batch())


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.0),
        lambda p: torch.optim.AdamW(p, lr=0.0, fused=True),
        lambda p: WritesThroughData(p, lr=0.0),
    ],
    ids=["SGD", "fused AdamW", "through data"],
)
def test_learning_rate_zero_is_an_update(make_optimizer: Callable[..., torch.optim.Optimizer]):
    model = make_model()
    engine = bigbatch.Engine(model, make_optimizer(model.parameters()), loss_fn, microbatch=4)
    assert engine.step(make_batch()).step == 1
    assert engine.step(make_batch()).step == 2


@pytest.mark.parametrize("position", ["after first backward", "before window.step()"])
@pytest.mark.parametrize("which", [0, 1])
def test_own_step_inside_window_raises(position: str, which: int):
    model = make_model()
    optimizers = split_optimizers(model)
    before = values(model)
    window = bigbatch.Accumulator(model, optimizers).window()
    window.backward(loss_fn(model, make_batch(4))[0], items=4)
    if position == "before window.step()":
        window.backward(loss_fn(model, make_batch(3))[0], items=3)
    message = (
        f"{('Muon', 'AdamW')[which]}.step() was called while a window holds undivided gradients. Remove the call: "
        "window.step() steps the optimizer, once."
    )
    with pytest.raises(WindowStateError) as caught:
        optimizers[which].step()
    assert str(caught.value) == message
    assert torch.equal(values(model), before)


def test_own_step_between_windows_is_allowed():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = bigbatch.Accumulator(model, optimizer)
    for _ in range(2):
        window = accumulator.window()
        window.backward(loss_fn(model, make_batch())[0], items=10)
        window.step()
        mean_loss_backward(model, make_batch())
        optimizer.step()
        optimizer.zero_grad()
    assert accumulator.num_steps == 2


def test_dropped_accumulator_leaves_no_hook():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = bigbatch.Accumulator(model, optimizer)
    window = accumulator.window()
    window.backward(loss_fn(model, make_batch())[0], items=10)
    assert optimizer._optimizer_step_pre_hooks
    del accumulator, window
    assert not optimizer._optimizer_step_pre_hooks
    optimizer.step()


# schedulers


class TimmLike:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, epoch: int, metric: float | None = None) -> None:
        raise AssertionError("not called")

    def step_update(self, num_updates: int) -> None:
        raise AssertionError("not called")


class NeedsEpoch:
    def step(self, *, epoch: int) -> None:
        raise AssertionError("not called")


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            TimmLike,
            "TimmLike.step() needs the argument 'epoch', and a window calls step() without any, once after each "
            "update. Leave scheduler= out and call scheduler.step_update(report.step) after each window.",
        ),
        (
            lambda _: NeedsEpoch(),
            "NeedsEpoch.step() needs the argument 'epoch', and a window calls step() without any, once after each "
            "update. Leave scheduler= out and call scheduler.step(epoch) after each window.",
        ),
        (
            lambda _: lambda step: 0.1 / (step + 1),
            "scheduler is a function, which has no step() method: pass an object whose step() sets the learning rate "
            "of the next update, such as torch.optim.lr_scheduler.LambdaLR(optimizer, function).",
        ),
        (
            lambda _: "cosine",
            "scheduler is a str, which has no step() method: pass an object whose step() sets the learning rate of the "
            "next update, such as torch.optim.lr_scheduler.LambdaLR(optimizer, function).",
        ),
    ],
    ids=["timm-like", "keyword", "function", "name"],
)
def test_scheduler_without_plain_step_is_rejected(scheduler: Callable[[Any], Any], message: str):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError) as caught:
        bigbatch.Engine(model, optimizer, loss_fn, microbatch=4, scheduler=scheduler(optimizer))
    assert str(caught.value) == message


# updates that fail half-way


class FailingSchedule(torch.optim.lr_scheduler.LambdaLR):
    """Raises in its step to the given update."""

    def __init__(self, optimizer: torch.optim.Optimizer, fails_at: int) -> None:
        self.fails_at = fails_at
        super().__init__(optimizer, lambda _: 1.0)

    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch + 1 == self.fails_at:
            raise ZeroDivisionError("no such epoch")
        super().step()


def engine_that_tears(*, fails_at: int = 2) -> tuple[nn.Module, bigbatch.Engine]:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = FailingSchedule(optimizer, fails_at)
    return model, bigbatch.Engine(model, optimizer, loss_fn, microbatch=4, scheduler=scheduler)


def test_failing_schedule_tears_the_update():
    model, engine = engine_that_tears()
    engine.step(make_batch())
    before = values(model)
    message = (
        "update 2 is torn: SGD.step() finished, and FailingSchedule.step() did not finish (ZeroDivisionError: no such "
        "epoch), so parameters, optimizer state and schedule may not belong together. Load a checkpoint: "
        "load_state_dict() of the engine, or of the model, optimizer and scheduler with a new Accumulator."
    )
    with pytest.raises(TornUpdateError) as caught:
        engine.step(make_batch())
    assert str(caught.value) == message
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert not torch.equal(values(model), before), "the parameters moved, and the error says so"
    for call in (lambda: engine.step(make_batch()), engine.state_dict):
        with pytest.raises(TornUpdateError) as again:
            call()
        assert str(again.value) == message


def test_loading_a_state_ends_torn_update():
    model, engine = engine_that_tears()
    engine.step(make_batch())
    state = copy.deepcopy(engine.state_dict())
    with pytest.raises(TornUpdateError):
        engine.step(make_batch())
    engine.load_state_dict(state)
    engine.accumulator.update.schedulers[0].fails_at = -1
    resumed = engine.step(make_batch())
    whole_model, whole = engine_that_tears(fails_at=-1)
    whole.step(make_batch())
    whole.step(make_batch())
    assert resumed.step == 2
    assert torch.equal(values(model), values(whole_model))


def test_failing_post_hook_tears_the_update():
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())

    def fail(*_: Any) -> None:
        raise OSError("log is full")

    optimizer.register_step_post_hook(fail)
    accumulator = bigbatch.Accumulator(model, optimizer)
    window = accumulator.window()
    window.backward(loss_fn(model, make_batch())[0], items=10)
    with pytest.raises(TornUpdateError, match=r"^update 1 is torn: Adam\.step\(\) did not finish \(OSError: log is "):
        window.step()
    assert window.state is WindowState.TORN
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(TornUpdateError):
        accumulator.window()


def test_error_before_anything_changed_aborts_only():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    handle = optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(OSError("log is full")))
    accumulator = bigbatch.Accumulator(model, optimizer)
    before = values(model)
    window = accumulator.window()
    window.backward(loss_fn(model, make_batch())[0], items=10)
    with pytest.raises(OSError, match="log is full"):
        window.step()
    assert window.state is WindowState.ABORTED
    assert torch.equal(values(model), before)
    handle.remove()
    window = accumulator.window()
    window.backward(loss_fn(model, make_batch())[0], items=10)
    assert window.step().step == 1


def test_second_optimizer_failing_names_the_first():
    model = make_model()
    optimizers = split_optimizers(model)
    engine = bigbatch.Engine(model, optimizers, loss_fn, microbatch=4)
    optimizers[1].register_step_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("lr")))
    with pytest.raises(TornUpdateError, match=r"^update 1 is torn: Muon\.step\(\) finished, and AdamW\.step\(\) did "):
        engine.step(make_batch())


@pytest.mark.parametrize(
    ("make_optimizer", "blind"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), False),
        (lambda p: torch.optim.SGD(p, lr=0.1, fused=True), True),
        (lambda p: torch.optim.AdamW(p, fused=True), False),
    ],
    ids=["SGD", "fused SGD", "fused AdamW"],
)
def test_snapshot_knows_when_nothing_changed(make_optimizer: Callable[..., torch.optim.Optimizer], blind: bool):
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    mean_loss_backward(model, make_batch())
    optimizer.step()
    before = StepSnapshot(optimizer, with_values=False)
    assert before.unchanged is not blind
    optimizer.step()
    assert not before.unchanged


# signals


@contextmanager
def handler(number: signal.Signals, function: Callable[..., Any]) -> Iterator[None]:
    before = signal.signal(number, function)
    try:
        yield
    finally:
        signal.signal(number, before)


def engine_that_signals(number: signal.Signals) -> tuple[nn.Module, bigbatch.Engine]:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: os.kill(os.getpid(), number))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    return model, bigbatch.Engine(model, optimizer, loss_fn, microbatch=4, scheduler=scheduler)


def test_interrupt_during_update_is_raised_after_it():
    model, engine = engine_that_signals(signal.SIGINT)
    before = values(model)
    with handler(signal.SIGINT, signal.default_int_handler), pytest.raises(KeyboardInterrupt):
        engine.step(make_batch())
    assert not torch.equal(values(model), before)
    assert engine.accumulator.num_steps == 1
    assert engine.accumulator.update.schedulers[0].last_epoch == 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_termination_handler_runs_after_the_update():
    _, engine = engine_that_signals(signal.SIGTERM)
    seen: list[tuple[int, int]] = []

    def note(number: int, _frame: Any) -> None:
        seen.append((number, engine.accumulator.num_steps))

    with handler(signal.SIGTERM, note):
        report = engine.step(make_batch())
        assert signal.getsignal(signal.SIGTERM) is note
    assert report.step == 1
    assert seen == [(signal.SIGTERM, 1)]


def test_update_in_a_thread_keeps_handlers():
    model = make_model()
    engine = bigbatch.Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, microbatch=4)
    before = signal.getsignal(signal.SIGINT)
    reports = []
    thread = threading.Thread(target=lambda: reports.append(engine.step(make_batch())))
    thread.start()
    thread.join()
    assert [report.step for report in reports] == [1]
    assert signal.getsignal(signal.SIGINT) is before


# inference mode


def test_step_in_inference_mode_is_refused():
    model = make_model()
    engine = bigbatch.Engine(model, torch.optim.AdamW(model.parameters()), loss_fn, microbatch=4)
    message = (
        "torch.inference_mode() is on, and tensors that are created under it can never be trained. Run windows "
        "outside of it; use it, or torch.no_grad(), for evaluation only."
    )
    with torch.inference_mode(), pytest.raises(WindowStateError) as caught:
        engine.step(make_batch())
    assert str(caught.value) == message
    assert engine.step(make_batch()).step == 1


def test_auto_in_inference_mode_is_refused():
    model = make_model()
    engine = bigbatch.Engine(model, torch.optim.AdamW(model.parameters()), loss_fn)
    with torch.inference_mode(), pytest.raises(WindowStateError, match=r"^torch\.inference_mode\(\) is on"):
        engine.step(make_batch())
    assert engine.step(make_batch()).step == 1


def test_model_from_inference_mode_is_rejected():
    with torch.inference_mode():
        model = nn.Linear(3, 2)
    message = (
        r"^a parameter of shape \(2, 3\) was created under torch\.inference_mode\(\), and can never be trained\. "
        r"Create the model outside of it\.$"
    )
    with pytest.raises(ValueError, match=message):
        bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))


# the gradient hook


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradient_hook_changes_the_whole_gradient(dtype: torch.dtype):
    inputs, labels = make_batch()
    batch = inputs.to(dtype), labels
    expected, actual = make_model().to(dtype), make_model().to(dtype)
    mean_loss_backward(expected, batch)
    torch.nn.utils.clip_grad_value_(expected.parameters(), 0.01)
    torch.optim.SGD(expected.parameters(), lr=1.0).step()
    calls = []

    def clip(parameters: Any) -> None:
        calls.append(len(parameters))
        torch.nn.utils.clip_grad_value_(parameters, 0.01)

    optimizer = torch.optim.SGD(actual.parameters(), lr=1.0)
    report = bigbatch.Engine(actual, optimizer, loss_fn, microbatch=3, gradient_hook=clip).step(batch)
    assert calls == [4]
    assert report.grad_norm > 0.05
    tolerance = 1e-14 if dtype is DOUBLE else 4e-3
    assert torch.allclose(values(actual), values(expected), rtol=0, atol=tolerance)


def test_gradient_hook_that_writes_nan_skips_the_window():
    def spoil(parameters: Any) -> None:
        parameters[0].grad[0] = torch.nan

    model = make_model()
    before = values(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=4, gradient_hook=spoil)
    report = engine.step(make_batch())
    assert report.skipped == "non-finite gradient"
    assert torch.equal(values(model), before)
    assert engine.accumulator.num_steps == 0


def test_error_in_gradient_hook_changes_nothing():
    model = make_model()
    before = values(model)
    engine = bigbatch.Engine(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, microbatch=4, gradient_hook=lambda p: p[99]
    )
    with pytest.raises(IndexError):
        engine.step(make_batch())
    assert torch.equal(values(model), before)
    assert engine.accumulator.num_steps == 0


def test_gradient_hook_that_is_no_function_is_rejected():
    model = make_model()
    with pytest.raises(TypeError, match=r"^gradient_hook is a float: pass a function of the parameters\.$"):
        bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), gradient_hook=0.1)  # type: ignore[arg-type]


# on CUDA, where fused optimizers are the default choice and write without a trace


CUDA_OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.01, fused=True),
    "capturable Adam": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01, device="cuda"), capturable=True),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "through data": lambda p: WritesThroughData(p, lr=0.01),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CUDA_OPTIMIZERS)
def test_cuda_optimizer_steps_like_full_batch(name: str):
    inputs, labels = make_batch()
    batch = inputs.cuda(), labels.cuda()
    expected, actual = make_model().cuda(), make_model().cuda()
    by_hand = CUDA_OPTIMIZERS[name](expected.parameters())
    engine = bigbatch.Engine(actual, CUDA_OPTIMIZERS[name](actual.parameters()), loss_fn, microbatch=3)
    for step in range(1, 4):
        mean_loss_backward(expected, batch)
        by_hand.step()
        by_hand.zero_grad()
        assert engine.step((inputs, labels)).step == step
    assert torch.allclose(values(actual), values(expected), rtol=0, atol=1e-11)


@pytest.mark.gpu
def test_cuda_closure_runs_the_whole_window_again():
    inputs, labels = make_batch()
    on_cpu, on_cuda = make_model(), make_model().cuda()
    first = bigbatch.Engine(on_cpu, SharpnessAware(on_cpu.parameters()), loss_fn, microbatch=10)
    second = bigbatch.Engine(on_cuda, SharpnessAware(on_cuda.parameters()), loss_fn, microbatch=3)
    for _ in range(2):
        first.step((inputs, labels))
        second.step((inputs, labels))
    assert torch.allclose(values(on_cuda).cpu(), values(on_cpu), rtol=0, atol=1e-12)


@pytest.mark.gpu
def test_cuda_graphs_reject_closure():
    model = make_model().cuda()
    engine = bigbatch.Engine(
        model,
        StrictlySharpnessAware(model.parameters()),
        lambda m, b: (F.cross_entropy(m(b[0]), b[1], reduction="sum"), (b[1] >= 0).sum()),
        microbatch=5,
        cuda_graphs=True,
    )
    with pytest.raises(TypeError, match=r"^StrictlySharpnessAware\.step\(\) needs a closure"):
        engine.step(make_batch())
