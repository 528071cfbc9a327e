"""State that is loaded before a level of offload is chosen: in host memory, then on the device. Here that is "meta"."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bigbatch.accumulation import deferred_offload
from bigbatch.accumulation.deferred_offload import DeferredOffload
from bigbatch.accumulation.optimizer_update import OptimizerUpdate
from bigbatch.errors import MemoryLimitError

OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda p: torch.optim.AdamW(p, foreach=False),
    lambda p: torch.optim.NAdam(p, foreach=False),
    lambda p: torch.optim.ASGD(p, foreach=False),
]


def layers(device: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(size, device=device, dtype=dtype)) for size in (3, 5)]


def trained(make: Callable[[Any], torch.optim.Optimizer]) -> dict[str, Any]:
    parameters = layers("cpu")
    optimizer = make(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


def devices(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Return the device of each kind of tensor in the state."""
    return {name: value.device.type for state in optimizer.state.values() for name, value in state.items()}


@pytest.mark.parametrize("make", OPTIMIZERS, ids=["adamw", "nadam", "asgd"])
def test_state_moves_as_the_optimizer_itself_loads_it(make: Callable[[Any], torch.optim.Optimizer]):
    state = trained(make)
    plain = make(layers("meta"))
    plain.load_state_dict(copy.deepcopy(state))
    optimizer = make(layers("meta"))
    deferred = DeferredOffload([optimizer])
    optimizer.load_state_dict(copy.deepcopy(state))
    assert set(devices(optimizer).values()) == {"cpu"}
    assert "meta" in devices(plain).values()
    deferred.move_to_device()
    assert devices(optimizer) == devices(plain)


def test_update_without_level_has_no_state():
    parameters = layers("cpu")
    optimizer = torch.optim.AdamW(parameters)
    update = OptimizerUpdate(optimizer)
    update.defer_offload()
    update.prepare()
    assert not optimizer.state
    update.set_offload("none")
    update.prepare()
    assert len(optimizer.state) == 2
    assert update.deferred is None


def test_level_that_is_chosen_steps_the_optimizers():
    optimizer = torch.optim.AdamW(layers("cpu"))
    update = OptimizerUpdate(optimizer)
    update.defer_offload()
    update.set_offload("optimizer")
    assert update.offload is not None
    assert update.offload.level == "optimizer"
    assert update.steps._offload is update.offload


def test_hooks_end_with_the_choice():
    optimizer = torch.optim.AdamW(layers("meta"), foreach=False)
    update = OptimizerUpdate(optimizer)
    update.defer_offload()
    update.set_offload("none")
    gc.collect()
    optimizer.load_state_dict(trained(OPTIMIZERS[0]))
    assert devices(optimizer)["exp_avg"] == "meta"


def test_copy_keeps_its_own_state_in_host_memory():
    optimizer = torch.optim.AdamW(layers("meta"), foreach=False)
    deferred = DeferredOffload([optimizer])
    copied, other = copy.deepcopy((optimizer, deferred))
    copied.load_state_dict(trained(OPTIMIZERS[0]))
    assert devices(copied)["exp_avg"] == "cpu"
    other.move_to_device()
    assert devices(copied)["exp_avg"] == "meta"
    assert not optimizer.state


def test_state_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch):
    def without_room(values: Any, device: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    optimizer = torch.optim.AdamW(layers("cpu"))
    update = OptimizerUpdate(optimizer)
    update.defer_offload()
    optimizer.load_state_dict(trained(OPTIMIZERS[0]))
    with monkeypatch.context() as patch:
        patch.setattr(deferred_offload, "_on_device", without_room)
        with pytest.raises(MemoryLimitError) as caught:
            update.set_offload("none")
    assert str(caught.value) == (
        "the optimizer state that was loaded does not fit on the device (CUDA out of memory. Tried to allocate 2.00 "
        "GiB): pass a level above none."
    )
    assert update.deferred is not None
    update.set_offload("none")
    assert update.deferred is None
