"""Batch norm over the batch of several ranks, against one process with the global batch, in float64."""

import pytest

from batch_norm import rank_runs
from batch_norm.models import TOLERANCE
from support.process_pool import Pools
from support.tiers import slow


@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving", "cumulative"])
@pytest.mark.parametrize(
    "sizes", [[7, 4], slow([9, 2]), slow([9, 0]), slow([0, 9]), slow([1, 1]), [5, 0, 3, 1]], ids=str
)
def test_ranks_are_exact(pools: Pools, sizes: list[int], momentum: float | None) -> None:
    for cut in (1, 4, 20):
        for result in pools(len(sizes)).run(rank_runs.run_windows, "ddp", sizes, cut, momentum):
            assert result["error"] <= TOLERANCE
            assert result["buffers"] <= 1e-14
            assert result["items"] == sum(sizes)


@pytest.mark.parametrize("syncs", [False, True], ids=["norms", "sync norms"])
def test_replicated_plain_model_is_exact(pools: Pools, syncs: bool) -> None:
    for result in pools(2).run(rank_runs.run_windows, "plain", [7, 4], 3, 0.1, syncs):
        assert result["error"] <= TOLERANCE
        assert result["buffers"] <= 1e-14


@pytest.mark.parametrize("where", ["forward", "backward", "batch"])
def test_failure_of_one_rank_ends_window_everywhere(pools: Pools, where: str) -> None:
    first, second = pools(2).run(rank_runs.run_failing, where)
    when = "before" if where == "batch" else "in"
    assert first[0].startswith(f"RankFailedError: rank 1 failed {when} the window, which therefore changes nothing")
    assert second[0].startswith("ArithmeticError: broken" if where != "batch" else "ValueError: ")
    assert [first[1], second[1]] == ["no error"] * 2


@pytest.mark.parametrize("call", [0, 1, 3, 4])
def test_abandoned_window_ends_everywhere(pools: Pools, call: int) -> None:
    for found in pools(2).run(rank_runs.run_abandoned, call):
        assert found == ["WindowAbandonedError: the window was abandoned on rank 1.", "no error"]


def test_other_order_of_ranks_is_refused(pools: Pools) -> None:
    for norm, found in zip(["norm", "other"], pools(2).run(rank_runs.run_other_order), strict=True):
        assert found == (
            "InputError: ranks 0 and 1 do not reach the same batch norms in the same order (this rank is at the batch "
            f"norm '{norm}'): batch_norm=\"exact\" needs every rank to run the same ones. Take branches that depend on "
            "the data out of the model, or leave batch_norm= out."
        )


@pytest.mark.parametrize("sizes", [[6, 7], [0, 7]], ids=str)
def test_out_of_memory_of_one_rank_keeps_every_sample(pools: Pools, sizes: list[int]) -> None:
    first, last = pools(2).run(rank_runs.run_out_of_memory, sizes)
    for result in (first, last):
        assert result["error"] <= TOLERANCE
        assert result["buffers"] <= 1e-14
    assert [first["retries"], last["retries"]] == [0, 1]
    assert first["used"] == ([4, 2] if sizes[0] else [])
    assert last["used"] == [2, 2, 2, 1]


def test_sample_that_does_not_fit_ends_window_everywhere(pools: Pools) -> None:
    first, second = pools(2).run(rank_runs.run_single_sample_out_of_memory)
    assert first.startswith("RankFailedError: rank 1 failed")
    assert second.startswith("MemoryLimitError: sample 0 of the batch does not fit in memory by itself")


REFUSED = {
    "sharded": 'batch_norm="exact" is not supported with a sharded model, whose ranks run one micro-batch after the '
    "other: use DistributedDataParallel or bigbatch.Replicated, without lockstep.",
    "lockstep": 'batch_norm="exact" is not supported with lockstep=True, whose ranks run one micro-batch after the '
    "other: use DistributedDataParallel or bigbatch.Replicated, without lockstep.",
    "float16": 'batch_norm="exact" over 2 ranks is not supported with float16, whose gradients each rank scales by '
    "itself: use bfloat16, and leave scaler= out.",
    "group": "the module 'norm' (SyncBatchNorm) has a process_group of 1 ranks, and batch_norm=\"exact\" normalizes by "
    "the batch of all 2 ranks: leave process_group= out, or leave batch_norm= out.",
}


@pytest.mark.parametrize("what", REFUSED)
def test_settings_of_ranks_are_refused(pools: Pools, what: str) -> None:
    assert pools(2).run(rank_runs.run_refused, what) == [REFUSED[what]] * 2


def test_function_with_statistics_needs_samples(pools: Pools) -> None:
    first, second = pools(2).run(rank_runs.run_functional_without_samples)
    assert first[0].startswith("InputError: this rank has no samples, and another one updates running statistics")
    assert second[0].startswith("RankFailedError: rank 0 failed")
    assert [first[1], second[1]] == ["no error"] * 2
