"""Additions to sums in host memory by several threads: the bits of one addition, and no effect on other threads."""

import threading

import pytest
import torch
from torch import Tensor

from bigbatch.offload import block_sums
from bigbatch.offload.block_sums import BLOCK, BlockSums

SIZES = [1, 77, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK - 5, 5 * BLOCK + 13]


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sums_have_the_bits_of_one_addition(num_threads: int, dtype: torch.dtype) -> None:
    sums = BlockSums(num_threads)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        values = torch.randn(size, generator=generator).to(dtype)
        values[::1000] = float("inf")
        values[::1500] = float("nan")
        start = torch.randn(size, generator=generator, dtype=wide)
        total = start.clone()
        sums.add(total, values)
        assert torch.equal(total.nan_to_num(7.0), (start + values).nan_to_num(7.0))
        sums.set(total, values)
        assert torch.equal(total.nan_to_num(7.0), values.to(wide).nan_to_num(7.0))
    sums.close()


def test_threads_of_torch_stay_as_they_are() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        sums = BlockSums(2)
        assert torch.get_num_threads() == 3
        assert sums._pool is not None
        assert [sums._pool.submit(torch.get_num_threads).result() for _ in range(4)] == [1] * 4
        assert BlockSums().num_threads == 3
        torch.set_num_threads(20)
        assert BlockSums().num_threads == 8
        sums.close()
    finally:
        torch.set_num_threads(before)


def test_large_sums_are_added_by_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[tuple[int, int]] = []
    monkeypatch.setattr(block_sums, "_set_part", lambda number, total, _: parts.append((number, len(total))))
    sums = BlockSums(3)
    sums.set(torch.zeros(3 * BLOCK), torch.zeros(3 * BLOCK))
    assert sorted(parts) == [(0, BLOCK), (1, BLOCK), (2, BLOCK)]
    parts.clear()
    sums.set(torch.zeros(BLOCK), torch.zeros(BLOCK))
    assert parts == [(0, BLOCK)]


def test_error_of_one_thread_is_raised_when_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    gate = threading.Event()

    def failing(number: int, total: Tensor, values: Tensor) -> None:
        if number == 0:
            gate.set()
            raise RuntimeError("no memory for this part")
        assert gate.wait(60)
        ended.append(number)

    monkeypatch.setattr(block_sums, "_set_part", failing)
    sums = BlockSums(2)
    with pytest.raises(RuntimeError, match="no memory for this part"):
        sums.set(torch.zeros(2 * BLOCK), torch.zeros(2 * BLOCK))
    assert ended == [1]
