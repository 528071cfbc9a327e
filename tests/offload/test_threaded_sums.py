"""Additions to sums in host memory by several threads: the bits of one addition, and no effect on other threads."""

import threading
from typing import Any

import pytest
import torch

from bigbatch.offload import threaded_sums
from bigbatch.offload.threaded_sums import SMALLEST_PART, ThreadedSums

SIZES = [1, 77, SMALLEST_PART, SMALLEST_PART + 1, 2 * SMALLEST_PART, 3 * SMALLEST_PART - 5, 5 * SMALLEST_PART + 13]


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_have_the_bits_of_one_addition(num_threads: int, dtype: torch.dtype) -> None:
    sums = ThreadedSums(num_threads)
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        values = torch.randn(size, generator=generator, dtype=dtype)
        values[::1000] = float("inf")
        values[::1500] = float("nan")
        start = torch.randn(size, generator=generator, dtype=dtype)
        total = start.clone()
        sums.add(total, values)
        assert torch.equal(total.nan_to_num(7.0), (start + values).nan_to_num(7.0))
        sums.set(total, values)
        assert torch.equal(total.nan_to_num(7.0), values.nan_to_num(7.0))
    sums.close()


def test_threads_are_those_of_torch_up_to_sixteen() -> None:
    before = torch.get_num_threads()
    try:
        for number, expected in ((1, 1), (3, 3), (20, 16)):
            torch.set_num_threads(number)
            sums = ThreadedSums()
            assert sums.num_threads == expected
            sums.close()
    finally:
        torch.set_num_threads(before)


def test_sums_are_added_by_torch_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threaded_sums, "np", None)
    sums = ThreadedSums()
    assert sums.num_threads == 1
    values = torch.randn(3 * SMALLEST_PART + 5, generator=torch.Generator().manual_seed(0))
    total = torch.ones(3 * SMALLEST_PART + 5)
    sums.add(total, values)
    assert torch.equal(total, 1 + values)
    sums.set(total, values)
    assert torch.equal(total, values)


def test_large_sums_are_added_by_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[tuple[bool, int]] = []
    caller = threading.current_thread()

    def record(total: Any, _: Any) -> None:
        parts.append((threading.current_thread() is caller, len(total)))

    monkeypatch.setattr(threaded_sums, "_set_part", record)
    sums = ThreadedSums(3)
    sums.set(torch.zeros(3 * SMALLEST_PART), torch.zeros(3 * SMALLEST_PART))
    assert parts == [(False, SMALLEST_PART)] * 3
    parts.clear()
    sums.set(torch.zeros(SMALLEST_PART), torch.zeros(SMALLEST_PART))
    assert parts == [(True, SMALLEST_PART)]


def test_error_of_one_thread_is_raised_when_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[float] = []
    gate = threading.Event()

    def failing(total: Any, _: Any) -> None:
        if total[0] == 0:
            gate.set()
            raise RuntimeError("no memory for this part")
        assert gate.wait(60)
        ended.append(total[0])

    monkeypatch.setattr(threaded_sums, "_set_part", failing)
    sums = ThreadedSums(2)
    with pytest.raises(RuntimeError, match="no memory for this part"):
        sums.set(torch.arange(2.0 * SMALLEST_PART), torch.zeros(2 * SMALLEST_PART))
    assert ended == [SMALLEST_PART]
