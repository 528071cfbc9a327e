"""Gradients that a thread adds to sums in host memory: order, staging memory in turn, and failures."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bigbatch.errors import WindowStateError
from bigbatch.offload.host_adder import HostAdder
from bigbatch.offload.transfers import Transfers

STAGING = 3 * 1024


class Gated(Transfers):
    """Copies whose end is waited for until a gate opens."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.gate, self.third = threading.Event(), threading.Event()

    def to_host(self, target: Tensor, source: Tensor) -> Any:
        super().to_host(target, source)
        if self.counts.num_to_host == 3:
            self.third.set()

    def wait(self, copy: Any) -> None:
        assert self.gate.wait(60)


def adder_of(transfers: Transfers | None = None) -> HostAdder:
    adder = HostAdder(transfers or Transfers(torch.device("cpu")), STAGING)
    adder.prepare()
    return adder


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 2000), min_size=1, max_size=30),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_sums_are_those_of_one_addition_after_the_other(sizes: Sequence[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(len(sizes))
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    totals = [torch.zeros(2000, dtype=wide) for _ in range(2)]
    adder = adder_of()
    for size in sizes:
        gradient = torch.randn(size, generator=generator).to(dtype)
        adder.add(totals[0][:size], gradient, replaces=False)
        totals[1][:size] += gradient
    adder.wait()
    assert torch.equal(*totals)


def test_first_gradient_replaces_what_was_in_memory() -> None:
    total, adder = torch.full((700,), torch.nan), adder_of()
    adder.add(total, torch.full((700,), -0.0, dtype=torch.bfloat16), replaces=True)
    adder.wait()
    assert torch.equal(torch.signbit(total), torch.ones(700, dtype=torch.bool))


def test_full_staging_memory_is_waited_for() -> None:
    transfers = Gated()
    adder, total = adder_of(transfers), torch.zeros(4, 256)
    thread = threading.Thread(target=lambda: adder.add(total.view(-1), torch.ones(1024), replaces=False))
    thread.start()
    assert transfers.third.wait(60)
    assert transfers.counts.num_to_host == 3  # the fourth piece has no memory before the first is added
    transfers.gate.set()
    thread.join(60)
    adder.wait()
    assert transfers.counts.num_to_host == 4
    assert torch.equal(total, torch.ones(4, 256))


def test_discarded_work_leaves_no_error() -> None:
    class Broken(Transfers):
        def wait(self, copy: Any) -> None:
            if is_broken:
                raise RuntimeError("CUDA error: unspecified launch failure")

    def add_ones() -> None:  # fails in `add` if the first part has failed before the last is sent
        adder.add(total, torch.ones(700), replaces=True)
        adder.wait()

    is_broken = True
    adder, total = adder_of(Broken(torch.device("cpu"))), torch.zeros(700)
    with pytest.raises(WindowStateError):
        add_ones()
    adder.discard()
    is_broken = False
    add_ones()
    assert torch.equal(total, torch.ones(700))


def test_interrupted_copy_of_a_part_spoils_the_window() -> None:
    class Interrupted(Transfers):
        def to_host(self, target: Tensor, source: Tensor) -> Any:
            if self.counts.num_to_host == 1 and is_interrupted:
                raise KeyboardInterrupt
            return super().to_host(target, source)

    is_interrupted = True
    adder, total = adder_of(Interrupted(torch.device("cpu"))), torch.zeros(700)
    with pytest.raises(KeyboardInterrupt):
        adder.add(total, torch.ones(700), replaces=True)
    with pytest.raises(WindowStateError, match=r"in host memory \(KeyboardInterrupt\), and the window has changed"):
        adder.wait()
    adder.discard()
    is_interrupted = False
    for _ in range(3):  # all of the staging memory is free
        adder.add(total, torch.ones(700), replaces=True)
    adder.wait()
    assert torch.equal(total, torch.ones(700))


def test_backwards_of_several_threads_add_whole_gradients() -> None:
    adder, total = adder_of(), torch.zeros(900)
    threads = [
        threading.Thread(target=lambda: [adder.add(total, torch.ones(900), replaces=False) for _ in range(20)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    adder.wait()
    assert torch.equal(total, torch.full((900,), 80.0))
