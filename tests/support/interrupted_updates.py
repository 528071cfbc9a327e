"""KeyboardInterrupt at a chosen line of `Engine.step` or `Window.step`, and what is left of the training state.

lines = num_lines("engine", "adamw-fused")       lines that Python runs in the call, those of torch included
outcome = interrupt("engine", "adamw-fused", 17) the state and the error if the 17th of them is interrupted
"""

import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from bigbatch.errors import TornUpdateError
from bigbatch.signal_deferral import DEFERRED

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adamw-foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "adamw-loop": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=False),
}
CALLS = ("engine", "window")
_RANDOM = torch.Generator().manual_seed(1)
BATCHES = [
    (torch.randn(8, 5, generator=_RANDOM).double(), torch.randn(8, 1, generator=_RANDOM).double()) for _ in range(3)
]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    return F.mse_loss(model(batch[0]), batch[1], reduction="sum"), batch[1].numel()


class Training:
    """A small model with an optimizer, a scheduler and clipping, after one update; ``call`` makes the next."""

    def __init__(self, call: str, optimizer: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.9)
        self.engine = bigbatch.Engine(
            self.model, self.optimizer, loss_fn, microbatch=3, max_grad_norm=0.5, scheduler=self.scheduler
        )
        self.engine.step(BATCHES[0])
        self.call = (lambda: self.engine.step(BATCHES[1])) if call == "engine" else self._window().step

    def _window(self) -> bigbatch.Window:
        window = self.engine.accumulator.window()
        for inputs, targets in zip(*(tensor.split(3) for tensor in BATCHES[1]), strict=True):
            loss_sum, items = loss_fn(self.model, (inputs, targets))
            window.backward(loss_sum, items=items)
        return window

    def state(self) -> list[Any]:
        """Return everything that an update changes, as plain values."""
        of_parameters = [
            {name: value.tolist() if isinstance(value, Tensor) else value for name, value in sorted(values.items())}
            for values in map(self.optimizer.state.__getitem__, self.model.parameters())
        ]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        parameters = [parameter.tolist() for parameter in self.model.parameters()]
        return [parameters, of_parameters, rates, self.scheduler.last_epoch, self.engine.accumulator.num_steps]


@dataclass(frozen=True)
class Outcome:
    """What an interrupted update left.

    Attributes:
        where: File, line and function that were interrupted.
        state: ``before`` or ``after`` the update, ``torn`` if neither.
        error: The error that the call raised; None if it returned.
        next_error: The error that the next ``Engine.step`` raises; None if it makes the right update.
        deferred: Whether SIGINT or SIGTERM was left with another handler than before.
    """

    where: str
    state: str
    error: BaseException | None
    next_error: BaseException | None
    deferred: bool

    @property
    def is_silent(self) -> bool:
        """Whether the state is torn, or the next update wrong, without an error that says so."""
        says_so = isinstance(self.error, TornUpdateError) and isinstance(self.next_error, TornUpdateError)
        if self.state == "torn":
            return not says_so
        return isinstance(self.next_error, AssertionError)


@cache
def references(call: str, optimizer: str) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Return the states before and after the update, and those after one more update from each."""
    training = Training(call, optimizer)
    before = training.state()
    training.call()
    after = training.state()
    training.engine.step(BATCHES[2])
    skipping = Training("engine", optimizer)
    assert skipping.state() == before
    skipping.engine.step(BATCHES[2])
    return before, after, skipping.state(), training.state()


def _traced(call: Callable[[], object], line: int) -> tuple[int, str, BaseException | None]:
    """Call a function and interrupt it at a line; return the number of lines, the place and the error."""
    count, where, error = 0, "", None

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count, where
        if event == "line":
            count += 1
            if count == line:
                sys.settrace(None)
                code = frame.f_code
                where = f"{code.co_filename.rpartition('site-packages/')[2]}:{frame.f_lineno} {code.co_name}"
                raise KeyboardInterrupt
        return trace

    tracer, unraisable = sys.gettrace(), sys.unraisablehook
    sys.unraisablehook = lambda _: None  # an interrupt inside a finalizer is lost
    sys.settrace(trace)
    try:
        call()
    except BaseException as raised:  # noqa: BLE001 - part of the outcome
        error = raised
    finally:
        sys.settrace(tracer)
        sys.unraisablehook = unraisable
    return count, where, error


def num_lines(call: str, optimizer: str) -> int:
    """Return how many lines Python runs in the update."""
    count, _, error = _traced(Training(call, optimizer).call, 0)
    assert error is None
    return count


def interrupt(call: str, optimizer: str, line: int) -> Outcome:
    """Interrupt the update at a line, counted from 1."""
    before, after, next_before, next_after = references(call, optimizer)
    training = Training(call, optimizer)
    handlers = {number: signal.getsignal(number) for number in DEFERRED}
    _, where, error = _traced(training.call, line)
    deferred = handlers != {number: signal.getsignal(number) for number in DEFERRED}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_grad_enabled(True)  # torch.no_grad() leaves it off if it is interrupted itself
    now = training.state()
    state = "before" if now == before else "after" if now == after else "torn"
    next_error: BaseException | None = None
    try:
        training.engine.step(BATCHES[2])
        assert training.state() == (next_before if state == "before" else next_after), "the next update is wrong"
    except (RuntimeError, AssertionError) as raised:
        next_error = raised
    return Outcome(where, state, error, next_error, deferred)


def sample(call: str, optimizer: str, size: int) -> list[tuple[Outcome, str]]:
    """Interrupt the update at some lines, spread over the whole call; return outcomes and causes of errors.

    To be run in a process of its own: an interrupt in the middle of an ``except`` clause may leave its exception behind
    in the interpreter, as the context of all later ones.
    """
    part = num_lines(call, optimizer) / size
    chosen = random.Random(f"{call} {optimizer}")
    outcomes = [interrupt(call, optimizer, 1 + int((i + chosen.random()) * part)) for i in range(size)]
    return [(outcome, type(getattr(outcome.error, "__cause__", None)).__name__) for outcome in outcomes]
