"""One rank runs out of memory: replicated models retry and stay exact; sharded models raise an error."""

import pytest

from distributed import out_of_memory_cases
from support import full_batch_reference as ref
from support.process_pool import Pools

TOLERANCE = 1e-12
REPLICATED = ("ddp", "plain")
NAMES = [name for name, _ in ref.TokenModel().named_parameters()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", REPLICATED)
def test_backward_oom_on_one_rank_is_exact(pools: Pools, how: str, name: str) -> None:
    for at in [(1,), (2, 3), (2, 3, 4)]:
        ours, theirs = pools(2).run(out_of_memory_cases.in_backward, how, name, *at)
        assert max(ours[0], theirs[0]) <= TOLERANCE
        assert (ours[1], theirs[1]) == (0, len(at))
        assert ours[2]
        assert theirs[2]


@pytest.mark.parametrize("how", REPLICATED)
@pytest.mark.parametrize("at", [(1,), (3,), (1, 2, 3)])
def test_forward_oom_on_one_rank_is_exact(pools: Pools, how: str, at: tuple[int, ...]) -> None:
    ours, theirs = pools(2).run(out_of_memory_cases.in_forward, how, *at)
    assert (ours[0], theirs[0]) == ("", "")
    assert max(ours[2], theirs[2]) <= TOLERANCE
    assert (ours[3], theirs[3]) == (0, len(at))


@pytest.mark.parametrize("how", REPLICATED)
def test_oversized_sample_on_one_rank_ends_all_windows(pools: Pools, how: str) -> None:
    ours, theirs = pools(2).run(out_of_memory_cases.in_forward, how, 1, 2, 3, 4)
    assert theirs[0] == "MemoryLimitError"
    assert "sample 0 of the batch does not fit in memory by itself (CUDA out of memory. Tried to" in theirs[1]
    assert ours[0] == "RankFailedError"
    assert "rank 1 failed in the window after update 0, which changed nothing on any rank" in ours[1]
    assert max(ours[2], theirs[2]) <= TOLERANCE


@pytest.mark.parametrize("how", ["fsdp", "fsdp-last"])
def test_sharded_oom_on_one_rank_reports_the_reason(pools: Pools, how: str) -> None:
    ours, theirs = pools(2).run(out_of_memory_cases.of_shards, how)
    assert ours == ("", "")
    assert theirs[0] == "ShardedMemoryError"
    assert theirs[1] == (
        "memory ran out in a micro-batch of 7 samples (CUDA out of memory. Tried to allocate 20.00 MiB), and the "
        "other ranks of a sharded model cannot wait for it to be split: start again from a checkpoint with smaller "
        "micro-batches."
    )
