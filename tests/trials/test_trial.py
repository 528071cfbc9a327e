"""`is_trial` is True in runs whose results are discarded, and only there."""

import threading

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import bigbatch
from bigbatch.autotune.peak_prediction import PeakPredictor
from bigbatch.preserve import preserved


class Logging:
    """A loss function that records for each call whether it is a trial, and whether its input has no data."""

    def __init__(self) -> None:
        self.calls: list[tuple[bool, bool]] = []

    def __call__(self, model: nn.Module, rows: Tensor) -> tuple[Tensor, int]:
        self.calls.append((bigbatch.is_trial(), isinstance(rows, FakeTensor)))
        return model(rows).square().sum(), len(rows)


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(3, 2)


def test_calls_of_engine_are_trials_until_first_window(model: nn.Module) -> None:
    loss_fn = Logging()
    engine = bigbatch.Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn)
    report = engine.step(torch.randn(16, 3))
    assert not bigbatch.is_trial()
    trials = [is_trial for is_trial, _ in loss_fn.calls]
    assert trials == [True] * (len(trials) - report.num_microbatches) + [False] * report.num_microbatches
    assert any(is_fake for _, is_fake in loss_fn.calls)
    loss_fn.calls.clear()
    engine.step(torch.randn(16, 3))
    assert set(loss_fn.calls) == {(False, False)}


def test_number_of_trials_is_bounded(model: nn.Module) -> None:
    """Sizes 1, 2, 4, ..., 32: each is warmed up once and timed ten times; and few predictions."""
    loss_fn = Logging()
    engine = bigbatch.Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn)
    choice = engine.tune(torch.randn(32, 3))
    assert choice.prediction_failure is None
    assert 3 * len(choice.trials) <= len(loss_fn.calls) <= 12 * len(choice.trials) + 4


def test_calls_of_verify_are_trials(model: nn.Module) -> None:
    loss_fn = Logging()
    bigbatch.verify(model, loss_fn, torch.randn(6, 3))
    assert set(loss_fn.calls) == {(True, False)}


def test_calls_of_prediction_are_trials_without_data(model: nn.Module) -> None:
    loss_fn = Logging()
    PeakPredictor.from_training(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn).predict(torch.ones(2, 3))
    assert loss_fn.calls == [(True, True)]


def test_trial_ends_with_an_error(model: nn.Module) -> None:
    def fail(_model: nn.Module, _rows: Tensor) -> tuple[Tensor, int]:
        assert bigbatch.is_trial()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bigbatch.verify(model, fail, torch.ones(4, 3))
    assert not bigbatch.is_trial()


def test_nested_trial_stays_a_trial(model: nn.Module) -> None:
    with preserved(model):
        with preserved(model):
            pass
        assert bigbatch.is_trial()


def test_other_threads_are_in_no_trial(model: nn.Module) -> None:
    answers: list[bool] = []
    with preserved(model):
        thread = threading.Thread(target=lambda: answers.append(bigbatch.is_trial()))
        thread.start()
        thread.join()
    assert answers == [False]
