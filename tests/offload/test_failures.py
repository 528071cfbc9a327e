"""Failures of an update with offload: at every transfer, for want of memory, by signals. It ends whole or says torn."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bigbatch
from bigbatch.errors import MemoryLimitError, TornUpdateError
from bigbatch.offload.transfers import Transfers
from offload.models import (
    OPTIMIZERS,
    is_in_buffers,
    make_batch,
    make_engine,
    make_model,
    plain_state,
    streamed_of,
    values,
)
from support.tiers import slow


class Link:
    """Calls something at one of the transfers, counted from 1 over both directions."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.num, self.at, self.what = 0, 0, lambda: None
        for name in ("_copy_to_device", "_copy_to_host"):
            patch.setattr(Transfers, name, self._wrap(getattr(Transfers, name)))

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def transfer(*arguments: Any) -> Any:
            self.num += 1
            if self.num == self.at:
                self.what()
            return original(*arguments)

        return transfer

    def arm(self, at: int, what: Callable[[], Any]) -> None:
        self.num, self.at, self.what = 0, at, what


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Link:
    return Link(monkeypatch)


def broken() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def start(name: str, updates: int) -> tuple[bigbatch.Engine, torch.optim.Optimizer]:
    model = make_model()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    engine = make_engine(model, optimizer)
    for number in range(updates):
        engine.step(make_batch(number))
    return engine, optimizer


def whole_state(engine: bigbatch.Engine, optimizer: torch.optim.Optimizer) -> tuple[list[float], list[Any]]:
    return values(engine.model).tolist(), plain_state(optimizer)


@pytest.mark.parametrize("updates", [slow(0), 2], ids=["first update", "later update"])
@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "sgd", "adafactor"])
def test_failure_at_any_transfer_loses_nothing(link: Link, name: str, updates: int):
    engine, optimizer = start(name, updates)
    engine.accumulator.prepare()
    link.arm(0, broken)
    engine.step(make_batch(updates))
    num_transfers = link.num
    engine.step(make_batch(updates + 1))
    expected = whole_state(engine, optimizer)
    assert num_transfers >= 5
    outcomes = []
    for at in range(1, num_transfers + 1):
        engine, optimizer = start(name, updates)
        engine.accumulator.prepare()
        before = whole_state(engine, optimizer)
        saved = {key: tensor.clone() for key, tensor in engine.model.state_dict().items()}
        optimizer_state = {
            index: {k: v.clone() for k, v in entry.items()} for index, entry in optimizer.state_dict()["state"].items()
        }
        link.arm(at, broken)
        with pytest.raises(RuntimeError) as caught:
            engine.step(make_batch(updates))
        link.arm(0, broken)
        outcomes.append(type(caught.value) is TornUpdateError)
        if outcomes[-1]:
            assert str(caught.value).startswith(f"update {updates + 1} is torn: {type(optimizer).__name__}.step() did")
            with pytest.raises(TornUpdateError):
                engine.step(make_batch(updates))
            with pytest.raises(TornUpdateError):
                engine.state_dict()
            engine.model.load_state_dict(saved)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": optimizer_state})
            engine.accumulator.update.steps.reset(updates)
        assert whole_state(engine, optimizer) == before
        engine.step(make_batch(updates))
        engine.step(make_batch(updates + 1))
        assert whole_state(engine, optimizer) == expected
    assert outcomes == sorted(outcomes)  # clean before the first chunk is computed, torn from there on
    assert outcomes[-1]
    if link.num and optimizer_has_state_before(name, updates):
        assert not outcomes[0]


def optimizer_has_state_before(name: str, updates: int) -> bool:
    """Whether the first transfer of the update loads state; else it stores the state that the step has created."""
    return bool(updates) or name != "sgd"


def test_device_without_room_for_slots_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    engine, optimizer = start("adamw", 2)
    before = whole_state(engine, optimizer)

    def full(self: Transfers, num_bytes: int) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 192.00 MiB")

    with monkeypatch.context() as patch:
        patch.setattr(Transfers, "device_memory", full)
        with pytest.raises(
            MemoryLimitError,
            match=r"^memory ran out within the step of AdamW \(CUDA out of memory\. Tried to allocate 192\.00 MiB\): "
            r"nothing was updated\.",
        ):
            engine.step(make_batch(2))
    assert whole_state(engine, optimizer) == before
    engine.step(make_batch(2))
    expected, _ = start("adamw", 3)
    assert torch.equal(values(engine.model), values(expected.model))


def test_host_without_room_is_refused_before_first_window(monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    model = make_model()
    engine = make_engine(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    before = values(model)
    monkeypatch.setattr("bigbatch.offload.transfers.torch.empty", full)
    with pytest.raises(
        MemoryLimitError,
        match=r"^2\.0 KiB of host memory for offloaded state cannot be allocated \(DefaultCPUAllocator: can't allocate "
        r"memory\): free host memory, raise the limit of this process on locked memory \(ulimit -l\), or use a lower "
        r"level of offload\.$",
    ):
        engine.accumulator.prepare()
    assert torch.equal(values(model), before)


@pytest.mark.parametrize("at", [1, 4, 8])
def test_signal_within_update_is_handled_after_it(link: Link, at: int):
    engine, optimizer = start("adamw", 2)
    expected, other = start("adamw", 3)
    received: list[int] = []
    handler = signal.signal(signal.SIGTERM, lambda *_: received.append(engine.accumulator.num_steps))
    try:
        link.arm(at, lambda: os.kill(os.getpid(), signal.SIGTERM))
        engine.step(make_batch(2))
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert received == [3]
    assert whole_state(engine, optimizer) == whole_state(expected, other)


def test_second_optimizer_that_fails_tears_update(link: Link):
    model = make_model()
    engine = make_engine(model, OPTIMIZERS["muon"](list(model.parameters())))
    engine.step(make_batch(0))
    link.arm(0, broken)
    engine.step(make_batch(1))
    link.arm(link.num, broken)
    with pytest.raises(
        TornUpdateError, match=r"^update 3 is torn: Muon\.step\(\) finished, and AdamW\.step\(\) did not"
    ):
        engine.step(make_batch(2))


def test_memory_of_device_is_released_after_failure(link: Link):
    engine, optimizer = start("adamw", 1)
    link.arm(3, broken)
    with pytest.raises(TornUpdateError):
        engine.step(make_batch(1))
    moments = [v for s in optimizer.state.values() for v in s.values() if v.ndim]
    assert all(is_in_buffers(tensor, streamed_of(engine)) for tensor in moments)
