"""Tensors that a forward keeps outside of itself, while micro-batches wait for each other at norms."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from batch_norm.models import (
    TOLERANCE,
    WIDTH,
    Batch,
    Small,
    buffer_error,
    engine_of,
    gradient_error,
    plain,
    rows,
    squares,
    whole,
)

SENTENCE = (
    r"^micro-batch 1 uses a tensor that micro-batch 3 made: a module, a hook or loss_fn keeps tensors outside of the "
    r'forward, such as self\.features, and with batch_norm="exact" the other micro-batches overwrite them while this '
    r"one waits at a norm\. Pass such tensors as arguments and return values, or leave batch_norm= out\.$"
)


def keeps_input(model: Any, x: Tensor) -> Tensor:
    model.kept = x
    return model.last(model.norm(model.first(x)).tanh()) + model.kept


def keeps_detached(model: Any, x: Tensor) -> Tensor:
    model.kept = model.first(x).detach()
    return model.last(model.norm(model.first(x)).tanh()) * model.kept


def keeps_in_list(model: Any, x: Tensor) -> Tensor:
    model.kept = [model.first(x)]
    return model.last(torch.cat([model.norm(model.kept[0]).tanh(), *model.kept], -1)[:, :WIDTH])


def keeps_output_of_norm(model: Any, x: Tensor) -> Tensor:
    model.kept = model.norm(model.first(x))
    return model.last(model.other(model.second(model.kept)).tanh()) * model.kept


@pytest.mark.parametrize("forward", [keeps_input, keeps_detached, keeps_in_list, keeps_output_of_norm])
def test_attribute_of_other_micro_batch_is_refused(forward: Any) -> None:
    model = Small(forward, other=nn.BatchNorm1d(WIDTH))
    before = copy.deepcopy(model)
    with pytest.raises(bigbatch.InputError, match=SENTENCE):
        engine_of(model, squares, 4).backward(rows(12))
    assert buffer_error(model, before) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_features_of_hook_are_refused() -> None:
    features: dict[str, Tensor] = {}
    model = Small(plain)
    model.first.register_forward_hook(lambda _module, _inputs, output: features.update(first=output.detach()))

    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, int]:
        return F.mse_loss(model(batch[0]) * features["first"], batch[1], reduction="sum"), len(batch[0])

    with pytest.raises(bigbatch.InputError, match=SENTENCE):
        engine_of(model, loss_fn, 4).backward(rows(12))


def test_replaced_parameters_are_refused() -> None:
    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, int]:
        doubled = {name: 2 * parameter for name, parameter in model.named_parameters()}
        outputs = torch.func.functional_call(model, doubled, (batch[0],))
        return F.mse_loss(outputs, batch[1], reduction="sum"), len(batch[0])

    model = Small(plain)
    parameters = dict(model.named_parameters())
    with pytest.raises(bigbatch.InputError, match=SENTENCE):
        engine_of(model, loss_fn, 4).backward(rows(12))
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_graph_through_norm_of_other_micro_batch_is_refused() -> None:
    outputs: list[Tensor] = []

    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, int]:
        outputs.append(model(batch[0]))
        return outputs[0].sum(), len(batch[0])

    with pytest.raises(bigbatch.InputError, match="uses a tensor that another one made: a module, a hook or loss_fn"):
        engine_of(Small(lambda model, x: model.norm(model.first(x))), loss_fn, 4).backward(rows(12))


def remembers(model: Any, x: Tensor) -> Tensor:
    if not hasattr(model, "scale"):
        model.scale = torch.linspace(1, 2, WIDTH, dtype=x.dtype)
    hidden = model.norm(model.first(x) * model.scale)
    if not hasattr(model, "shift"):
        model.shift = model.scale.flip(0)
    return model.last((hidden + model.shift).tanh())


def test_cache_of_first_micro_batch_is_exact() -> None:
    model = Small(remembers)
    expected = whole(model, squares, [rows(12)])
    engine_of(model, squares, 4).backward(rows(12))
    assert gradient_error(model, expected) <= TOLERANCE


def test_tensor_in_every_micro_batch_is_exact() -> None:
    def loss_fn(model: Any, batch: Any) -> tuple[Tensor, int]:
        inputs, targets, factor = batch
        return F.mse_loss(model(inputs) * factor, targets, reduction="sum"), len(inputs)

    batch = (*rows(12), torch.tensor(3.0, dtype=torch.float64))
    model = Small(plain)
    expected = whole(model, loss_fn, [batch])
    engine_of(model, loss_fn, 4).backward(batch)
    assert gradient_error(model, expected) <= TOLERANCE


def test_value_changed_in_place_is_exact() -> None:
    """Running sums that every forward changes before and after a norm belong to no micro-batch."""

    def counts(model: Any, x: Tensor) -> Tensor:
        model.sums += x.detach().sum(0)
        hidden = model.norm(model.first(x))
        model.sums += hidden.detach().sum(0)
        return model.last(hidden.tanh())

    model = Small(counts)
    model.register_buffer("sums", torch.zeros(WIDTH, dtype=torch.float64))
    expected = whole(model, squares, [rows(12)])
    engine_of(model, squares, 4).backward(rows(12))
    assert gradient_error(model, expected) <= TOLERANCE
    assert buffer_error(model, expected) <= 1e-13
