"""The modules that a loss function uses are found, wherever it refers to them."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
from torch import nn

from bigbatch.trials.loss_modules import modules_used_by

CRITERION = nn.CrossEntropyLoss()


def with_global(model: Any, batch: Any) -> Any:
    return [CRITERION(model(batch), part) for part in batch]


def with_global_inside(model: Any, batch: Any) -> Any:
    return (lambda: CRITERION(model, batch))()


def with_default(model: Any, batch: Any, criterion: Any = CRITERION) -> Any:
    return criterion(model, batch)


def with_keyword_default(model: Any, batch: Any, *, criterion: Any = CRITERION) -> Any:
    return criterion(model, batch)


def with_parameter(criteria: Any, model: Any, batch: Any) -> Any:
    return criteria["a"][0](model, batch)


def with_none(model: Any, batch: Any) -> Any:
    return nn.functional.mse_loss(model, batch)


def closed() -> Callable[..., Any]:
    criterion = CRITERION
    return lambda model, batch: criterion(model, batch)


def decorated() -> Callable[..., Any]:
    @wraps(with_global)
    def outer(*arguments: Any) -> Any:
        return with_global(*arguments)

    return outer


class Task:
    def __init__(self) -> None:
        self.parts = {"criterion": [CRITERION]}

    def loss(self, model: Any, batch: Any) -> Any:
        return self.parts["criterion"][0](model, batch)


class CallableTask(Task):
    def __call__(self, model: Any, batch: Any) -> Any:
        return self.loss(model, batch)


FUNCTIONS = {
    "global": with_global,
    "global in an inner function": with_global_inside,
    "default": with_default,
    "keyword default": with_keyword_default,
    "partial": partial(with_parameter, {"a": [CRITERION]}),
    "closure": closed(),
    "decorator": decorated(),
    "method": Task().loss,
    "callable object": CallableTask(),
    "partial of a callable object": partial(CallableTask()),
    "module": CRITERION,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_module_of_loss_function_is_found_once(name: str) -> None:
    assert modules_used_by(FUNCTIONS[name]) == [CRITERION]


def test_plain_loss_function_uses_no_module() -> None:
    assert modules_used_by(with_none) == []


def test_unassigned_variable_of_closure_is_ignored() -> None:
    def loss(model: Any, batch: Any) -> Any:
        return later(model, batch)

    assert modules_used_by(loss) == []
    later = CRITERION
    assert modules_used_by(loss) == [CRITERION]
