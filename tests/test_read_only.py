"""Attributes of an engine or accumulator that its other parts have copied cannot be replaced silently."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import bigbatch
from bigbatch.read_only import read_only
from support import full_batch_reference as ref

ENGINE = ["accumulator", "sync", "model", "collate", "lengths", "layout", "batch_dim", "quantum"]
ACCUMULATOR = ["model", "optimizer", "sync", "update"]


def make_engine() -> bigbatch.Engine:
    model = ref.make_model()
    return bigbatch.Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), ref.loss_and_items, microbatch=4)


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("Engine", name) for name in ENGINE), *(("Accumulator", name) for name in ACCUMULATOR)],
    ids=lambda value: value,
)
def test_replacement_is_refused(kind: str, name: str):
    engine = make_engine()
    owner = engine if kind == "Engine" else engine.accumulator
    before = getattr(owner, name)
    for replace in (lambda: setattr(owner, name, copy.copy(before)), lambda: delattr(owner, name)):
        with pytest.raises(AttributeError) as caught:
            replace()
        assert str(caught.value) == (
            f"{kind}.{name} cannot be replaced: other parts of the {kind} keep the one that it was made with. Make "
            f"another {kind}, and load the state of this one if it has been trained."
        )
    assert getattr(owner, name) is before
    engine.step(ref.ragged_batch(6))


@pytest.mark.parametrize("name", inspect.signature(bigbatch.Engine).parameters)
def test_settings_of_an_engine_never_change_in_silence(name: str):
    """Each is an attribute whose new value is used, or cannot be assigned."""
    engine = make_engine()
    if name in ("loss_fn", "memory", "count_items"):
        assert hasattr(engine, name)
        return
    with pytest.raises(AttributeError):
        setattr(engine, name, getattr(engine, name, 1))


@pytest.mark.parametrize("kind", ["Engine", "Accumulator"])
def test_assigned_setting_is_refused(kind: str):
    engine = make_engine()
    owner = engine if kind == "Engine" else engine.accumulator
    assert not hasattr(owner, "max_grad_norm")
    with pytest.raises(AttributeError) as caught:
        owner.max_grad_norm = 0.1
    assert str(caught.value) == (
        f"{kind}.max_grad_norm is a setting of {kind}(max_grad_norm=...), and a later value would be ignored. Make "
        f"another {kind}, and load the state of this one if it has been trained."
    )


def test_content_can_be_changed():
    engine = make_engine()
    engine.model.head = nn.Linear(8, ref.VOCABULARY).double().requires_grad_(False)
    engine.accumulator.optimizer.param_groups[0]["lr"] = 0.0
    before = ref.parameters_of(engine.model)
    engine.step(ref.ragged_batch(6))
    assert ref.relative_error(ref.parameters_of(engine.model), before) == 0


@read_only("value")
class Holder:
    def __init__(self, value: int) -> None:
        self.value = value


def test_value_is_part_of_copies():
    assert Holder(3).value == 3
    assert copy.deepcopy(Holder(3)).value == 3
    assert pickle.loads(pickle.dumps(Holder(4))).value == 4
    assert vars(Holder(3)) == {"value": 3}
