"""Everything that hangs on an object is restored, in place; what is not data is left alone."""

import array
import threading
from collections import Counter, UserDict, defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bigbatch.trials.object_state import ObjectState
from support.stateful_models import KINDS, Stateful, describe, loss_fn, rows


def saved(*roots: Any, **settings: Any) -> ObjectState:
    state = ObjectState(**settings)
    state.add(*roots)
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_state_is_restored_twice(kind: type[Stateful]) -> None:
    model = kind()
    before, state = describe(model), saved(model)
    for _ in range(2):
        loss_fn(model, rows())
        loss_fn(model, rows(3))
        assert describe(model) != before
        state.restore()
        assert describe(model) == before


def test_references_from_elsewhere_see_restored_content() -> None:
    module = nn.Module()
    module.log = log = [1, {"a": torch.ones(2)}]
    values = log[1]["a"]  # type: ignore[index]
    state = saved(module)
    values.fill_(7)
    log[1]["b"] = 2  # type: ignore[index]
    log.append(3)
    module.log = []
    state.restore()
    assert module.log is log
    assert log == [1, {"a": values}]
    assert values.tolist() == [1, 1]


CONTAINERS: dict[str, Any] = {
    "Counter": (lambda: Counter("aab"), lambda value: value.update("abc")),
    "defaultdict": (lambda: defaultdict(list, a=[1]), lambda value: (value["a"].append(2), value["b"])),
    "dict in another order": (lambda: {"a": 1, "b": 2}, lambda value: value.update(a=value.pop("a"))),
    "dict with tensors as keys": (lambda: {torch.ones(2): 1, torch.ones(3): 2}, lambda value: value.popitem()),
    "UserDict": (lambda: UserDict(a=1), lambda value: value.update(a=2)),
    "array": (lambda: array.array("d", [1, 2]), lambda value: value.append(3)),
    "bytearray": (lambda: bytearray(b"ab"), lambda value: value.extend(b"c")),
    "namespace": (lambda: SimpleNamespace(a=1), lambda value: vars(value).update(a=2, b=3)),
    "object array": (lambda: np.array([[1], None], dtype=object), lambda value: value[0].append(2)),
    "resized array": (lambda: np.zeros(3, dtype=np.float16), lambda value: value.resize(5, refcheck=False)),
    "RandomState": (lambda: np.random.RandomState(1), lambda value: value.rand()),
}


def printed(value: Any) -> str:
    return str(value.get_state()) if isinstance(value, np.random.RandomState) else repr(value)


@pytest.mark.parametrize("name", CONTAINERS)
def test_container_is_restored_in_place(name: str) -> None:
    make, write = CONTAINERS[name]
    value = make()
    before, state = printed(value), saved({"holder": (value,)})
    write(value)
    assert printed(value) != before
    state.restore()
    assert printed(value) == before


def test_cycle_of_objects_is_restored() -> None:
    class Node:
        def __init__(self) -> None:
            self.next: Any = self
            self.count = 0

    node = Node()
    state = saved(node)
    node.count, node.next = 5, None
    state.restore()
    assert node.count == 0
    assert node.next is node


def test_what_is_not_data_is_left_alone() -> None:
    class Locked:
        def __init__(self) -> None:
            self.lock, self.thread, self.local = threading.Lock(), threading.Thread(target=print), threading.local()
            self.function, self.optimizer = print, torch.optim.SGD([torch.zeros(1)], lr=0.1)

    holder = Locked()
    state = saved(holder)
    values = dict(vars(holder))
    holder.lock.acquire()
    holder.thread.name = "another"
    holder.optimizer.param_groups[0]["lr"] = 1.0
    state.restore()
    assert vars(holder) == values
    assert holder.lock.locked()
    assert holder.thread.name == "another"
    assert holder.optimizer.param_groups[0]["lr"] == 1.0


def test_hooks_and_modes_are_left_alone() -> None:
    model = nn.Linear(1, 1)
    state = saved(model)
    model.register_forward_hook(lambda *_: None)
    model.eval()
    state.restore()
    assert len(model._forward_hooks) == 1
    assert not model.training


def test_wrapper_keeps_its_attributes_and_wrapped_module_is_restored() -> None:
    wrapper = nn.DataParallel(nn.BatchNorm1d(2))
    wrapper.module.calls = 0
    state = saved(wrapper)
    wrapper.dim = 1
    wrapper.module.calls = 5
    wrapper.module.running_mean.fill_(3)
    state.restore()
    assert wrapper.dim == 1
    assert wrapper.module.calls == 0
    assert wrapper.module.running_mean.tolist() == [0, 0]


def expanded() -> Tensor:
    return torch.ones(1, 3, dtype=torch.float64).expand(4, 3)


def made_in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3)


def fill(tensor: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()):
        tensor.view(-1)[:1].fill_(7)


TENSORS: dict[str, Any] = {
    "expanded": (expanded, lambda tensor: tensor[0].fill_(5)),
    "inference": (made_in_inference_mode, fill),
    "not a number": (lambda: torch.tensor([float("nan"), 1]), lambda tensor: tensor.fill_(0)),
    "resized": (lambda: torch.ones(2, dtype=torch.int8), lambda tensor: tensor.resize_(4).fill_(2)),
    "sparse": (lambda: torch.eye(3).to_sparse(), lambda tensor: tensor.mul_(2)),
    "complex": (lambda: torch.ones(2, dtype=torch.complex64), lambda tensor: tensor.mul_(1j)),
    "transposed": (lambda: torch.arange(6.0).view(2, 3).t(), lambda tensor: tensor.zero_()),
    "rebound": (lambda: torch.ones(2), lambda tensor: setattr(tensor, "data", torch.zeros(5))),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensor_of_any_kind_is_restored(name: str) -> None:
    make, write = TENSORS[name]
    tensor = make()
    before, state = str(tensor), saved([tensor])
    write(tensor)
    assert str(tensor) != before
    state.restore()
    assert str(tensor) == before


def test_tensor_without_data_is_accepted() -> None:
    module = nn.Linear(2, 2, device="meta")
    module.cache = first = torch.zeros(3, device="meta")
    state = saved(module)
    module.cache = torch.zeros(4, device="meta")
    state.restore()
    assert module.cache is first


def test_tensor_written_with_graph_becomes_leaf_again() -> None:
    weight = nn.Parameter(torch.ones(2))
    module = nn.Module()
    module.total = total = torch.zeros(2)
    state = saved(module)
    total.add_(weight * 3)
    assert not total.is_leaf
    state.restore()
    assert total.is_leaf
    assert not total.requires_grad
    assert total.tolist() == [0, 0]


def test_parameter_values_are_not_copied_unless_requested() -> None:
    module = nn.Linear(2, 2)
    state = saved(module, parameters=False)
    first = module.weight.data
    module.bias.data.fill_(4)
    module.weight.data = torch.zeros(2, 2)
    state.restore()
    assert module.weight.data_ptr() == first.data_ptr()
    assert module.bias.tolist() == [4, 4]


def test_interrupted_restore_finishes_and_raises() -> None:
    interrupts = [KeyboardInterrupt("first"), ValueError("second")]

    class Interrupting(type):
        def __setattr__(cls, name: str, value: Any) -> None:
            if interrupts and name == "calls" and value == 0:
                raise interrupts.pop(0)
            super().__setattr__(name, value)

    class Holder(nn.Module, metaclass=Interrupting):
        calls = 0

    module = Holder()
    module.log = [1]
    state = saved(module)
    Holder.calls = 5
    module.log.append(2)
    with pytest.raises(KeyboardInterrupt, match="first"):
        state.restore()
    assert module.log == [1]
    state.restore()
    assert Holder.calls == 0
