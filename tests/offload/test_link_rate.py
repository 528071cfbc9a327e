"""The measured rate of the link, against links that take a known time."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bigbatch.errors import MemoryLimitError
from bigbatch.offload import link_rate
from bigbatch.offload.chunk_sizes import SUM_SLOT_BYTES
from bigbatch.offload.link_rate import NUM_COPIES, measure_link_rate
from bigbatch.offload.transfers import Transfers

CPU = torch.device("cpu")


class Link(Transfers):
    """Takes seconds of a clock of its own for the copies, in both directions at once, and more for the first ones."""

    def __init__(self, to_device: float, to_host: float) -> None:
        super().__init__(CPU)
        self.rates, self.busy_s, self.now_s = (to_device, to_host), [100.0, 0.0], 0.0
        self.num_finished = 0

    def device_memory(self, num_bytes: int) -> Tensor:
        return torch.empty(0, dtype=torch.uint8).expand(0)

    def host_memory(self, num_bytes: int) -> Tensor:
        self.num_bytes = num_bytes
        return torch.empty(0, dtype=torch.uint8)

    def _copy_to_device(self, target: Tensor, source: Tensor, after: Sequence[Any]) -> None:
        self.busy_s[0] += self.num_bytes / self.rates[0]

    def _copy_to_host(self, target: Tensor, source: Tensor) -> None:
        self.busy_s[1] += self.num_bytes / self.rates[1]

    def finish(self) -> None:
        self.num_finished += 1
        self.now_s += max(self.busy_s)
        self.busy_s = [0.0, 0.0]


def measured(monkeypatch: pytest.MonkeyPatch, link: Transfers) -> float | None:
    monkeypatch.setattr(link_rate, "make_transfers", lambda _: link)
    if isinstance(link, Link):
        monkeypatch.setattr(link_rate.time, "perf_counter", lambda: link.now_s)
    return measure_link_rate(CPU)


@pytest.mark.parametrize("rates", [(2e9, 2e9), (5e9, 2e9), (2e9, 5e9)])
def test_rate_is_that_of_the_slower_direction(monkeypatch: pytest.MonkeyPatch, rates: tuple[float, float]) -> None:
    link = Link(*rates)
    assert measured(monkeypatch, link) == pytest.approx(2e9)
    assert link.counts.num_to_device == link.counts.num_to_host == NUM_COPIES + 1
    assert link.num_bytes == SUM_SLOT_BYTES


@pytest.mark.parametrize(
    ("name", "error"), [("host_memory", MemoryLimitError("no")), ("device_memory", torch.OutOfMemoryError("no"))]
)
def test_rate_is_unknown_without_memory(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    def full(*_: object) -> Tensor:
        raise error

    monkeypatch.setattr(Transfers, name, full)
    assert measured(monkeypatch, Transfers(CPU)) is None


def test_copies_have_ended_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Link):
        def _copy_to_host(self, target: Tensor, source: Tensor) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    link = Broken(1e9, 1e9)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measured(monkeypatch, link)
    assert link.num_finished == 1


def test_link_of_this_machine_has_a_rate() -> None:
    rate = measure_link_rate(CPU)
    assert rate is not None
    assert rate > 0
