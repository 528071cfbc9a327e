"""An interrupted update is whole, undone or says that it is torn; `benchmarks/interrupts.py` tries every line."""

import copy
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bigbatch import signal_deferral
from bigbatch.accumulation.pending_update import WindowState
from bigbatch.errors import TornUpdateError
from bigbatch.signal_deferral import DEFERRED, DeferredSignals
from support.interrupted_updates import BATCHES, CALLS, OPTIMIZERS, Training, references, sample
from support.process_pool import Pool
from support.tiers import slow_except

NUM_LINES = 80


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Handle SIGINT as Python does in a program; test runners may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def process() -> Iterator[Pool]:
    """Run functions in a process of its own."""
    pool = Pool(1)
    yield pool
    pool.close()


@pytest.mark.parametrize("optimizer", slow_except(OPTIMIZERS, "sgd", "adamw-loop"))
@pytest.mark.parametrize("call", CALLS)
def test_interrupted_update_is_whole_undone_or_torn(call: str, optimizer: str, process: Pool) -> None:
    (sampled,) = process.run(sample, call, optimizer, NUM_LINES, timeout_s=120.0)
    outcomes = [outcome for outcome, _ in sampled]
    assert [outcome for outcome in outcomes if outcome.is_silent] == []
    assert {"before", "after"} <= {outcome.state for outcome in outcomes}
    assert [
        o for o in outcomes if o.deferred and "signal_deferral" not in o.where and "/signal.py" not in o.where
    ] == []
    causes = [cause for outcome, cause in sampled if isinstance(outcome.error, TornUpdateError)]
    assert causes, "some of the lines are in the step of the optimizer"
    assert set(causes) == {"KeyboardInterrupt"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_torn_update_is_reported_until_state_is_loaded(optimizer: str) -> None:
    training = Training("engine", optimizer)
    saved = copy.deepcopy(training.engine.state_dict())

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = training.optimizer.register_step_post_hook(interrupted)
    with pytest.raises(TornUpdateError) as caught:
        training.call()
    handle.remove()
    name = type(training.optimizer).__name__
    assert str(caught.value) == (
        f"update 2 is torn: {name}.step() did not finish (KeyboardInterrupt), so parameters, optimizer state and "
        "schedule may not belong together. Load a checkpoint: load_state_dict() of the engine, or of the model, "
        "optimizer and scheduler with a new Accumulator."
    )
    with pytest.raises(TornUpdateError, match=r"^update 2 is torn: "):
        training.engine.step(BATCHES[2])
    with pytest.raises(TornUpdateError, match=r"^update 2 is torn: "):
        training.engine.accumulator.window()
    training.engine.load_state_dict(saved)
    training.engine.step(BATCHES[1])
    assert training.state() == references("engine", optimizer)[1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_in_step_interrupts_after_update(call: str, optimizer: str, ctrl_c: None) -> None:
    training = Training(call, optimizer)
    handle = training.optimizer.register_step_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        training.call()
    handle.remove()
    _, after, _, next_after = references(call, optimizer)
    assert training.state() == after
    assert [parameter.grad for parameter in training.model.parameters()] == [None] * 4
    if call == "window":
        assert training.call.__self__.state is WindowState.CLOSED  # type: ignore[attr-defined]
    training.engine.step(BATCHES[2])
    assert training.state() == next_after


def test_ctrl_c_while_restoring_leaves_no_handler(ctrl_c: None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in DEFERRED]
    restore, signals = signal.signal, [signal.SIGINT]

    def interrupted(number: int, handler: Any) -> Any:
        deferring = restore(number, handler)
        if handler is signal.default_int_handler and signals:
            os.kill(os.getpid(), signals.pop())
        return deferring

    monkeypatch.setattr(signal_deferral, "_set_handler", interrupted)
    with pytest.raises(KeyboardInterrupt), DeferredSignals():
        torch.ones(1)
    assert [signal.getsignal(number) for number in DEFERRED] == before


def test_signal_that_ends_the_process_is_not_deferred(ctrl_c: None) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with DeferredSignals():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
