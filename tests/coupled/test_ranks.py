"""Coupled losses over several ranks, against one process with the global batch, in float64."""

import pytest

from coupled import rank_runs
from support.process_pool import Pools
from support.tiers import slow

TOLERANCE = 1e-12


@pytest.mark.parametrize("gather", ["none", "all"])
@pytest.mark.parametrize("loss", ["head", "plain"])
@pytest.mark.parametrize("sizes", [[14, 8], [11, 11], [9, 0], [0, 9], [9, 0, 6, 7]], ids=str)
def test_ranks_give_gradient_of_global_batch(pools: Pools, sizes: list[int], loss: str, gather: str) -> None:
    for cut in (4, 20):
        for result in pools(len(sizes)).run(rank_runs.run_window, "ddp", loss, gather, sizes, cut):
            assert result["error"] <= TOLERANCE
            assert result["loss_error"] <= TOLERANCE
            assert result["items"] == sum(sizes)


@pytest.mark.parametrize("gather", ["none", "all"])
def test_replicated_plain_model_is_exact(pools: Pools, gather: str) -> None:
    for result in pools(2).run(rank_runs.run_window, "plain", "head", gather, [14, 8], 3):
        assert result["error"] <= TOLERANCE


@pytest.mark.parametrize("gather", ["none", "all"])
@pytest.mark.parametrize("sizes", [[14, 8], [9, 0]], ids=str)
def test_replicated_lockstep_is_exact(pools: Pools, sizes: list[int], gather: str) -> None:
    for result in pools(2).run(rank_runs.run_window, "ddp", "head", gather, sizes, 3, True):
        assert result["error"] <= TOLERANCE
        assert result["items"] == sum(sizes)


@pytest.mark.parametrize("gather", ["none", "all"])
@pytest.mark.parametrize("loss", ["head", "plain"])
@pytest.mark.parametrize("how", ["fsdp", slow("fsdp-last")])
@pytest.mark.parametrize("sizes", [[14, 8], [9, 0]], ids=str)
def test_sharded_model_is_exact(pools: Pools, how: str, loss: str, sizes: list[int], gather: str) -> None:
    for result in pools(2).run(rank_runs.run_window, how, loss, gather, sizes, 4):
        assert result["error"] <= TOLERANCE
        assert result["loss_error"] <= TOLERANCE
        assert result["items"] == sum(sizes)


@pytest.mark.parametrize("gather", ["none", "all"])
def test_restart_of_one_rank_keeps_every_sample(pools: Pools, gather: str) -> None:
    results = pools(2).run(rank_runs.run_with_dropout, gather, [10, 7], 3)
    assert [result["error"] <= TOLERANCE for result in results] == [True, True], results
    assert [result["retries"] for result in results] == [0, 1]
    assert results[0]["used"] == [4, 4, 2]
    assert results[1]["used"] == [2, 2, 3]


@pytest.mark.parametrize("where", ["first pass", "loss", "second pass"])
@pytest.mark.parametrize("gather", ["none", "all"])
def test_failure_of_one_rank_ends_window_everywhere(pools: Pools, gather: str, where: str) -> None:
    assert pools(2).run(rank_runs.run_failing, gather, where) == ["RankFailedError", "ArithmeticError"]


@pytest.mark.parametrize("gather", ["none", "all"])
def test_batch_that_cannot_be_split_ends_window_everywhere(pools: Pools, gather: str) -> None:
    assert pools(2).run(rank_runs.run_failing, gather, "batch") == ["RankFailedError", "ValueError"]


@pytest.mark.parametrize("which", ["first", "second"])
@pytest.mark.parametrize("gather", ["none", "all"])
def test_window_abandoned_on_one_rank_is_dropped_everywhere(pools: Pools, gather: str, which: str) -> None:
    assert pools(2).run(rank_runs.run_failing, gather, f"abandon in {which} pass") == ["WindowAbandonedError"] * 2


@pytest.mark.parametrize("gather", ["none", "all"])
def test_hybrid_sharded_model_is_exact(pools: Pools, gather: str) -> None:
    for result in pools(4).run(rank_runs.run_window, "hsdp", "head", gather, [9, 1, 6, 7], 4):
        assert result["error"] <= TOLERANCE


def test_different_shapes_are_refused_on_every_rank(pools: Pools) -> None:
    message = (
        "rank 1 encoded features [samples, 2] in torch.float64 and [samples, 2] in torch.float64, and rank 0 "
        '[samples, 4] in torch.float64 and [samples, 4] in torch.float64: with gather="all" all ranks need the same '
        "shapes and dtypes."
    )
    assert pools(2).run(rank_runs.run_other_shapes) == [message, message]


@pytest.mark.parametrize("sizes", [[14, 8], [0, 12]], ids=str)
def test_labels_and_masks_are_gathered(pools: Pools, sizes: list[int]) -> None:
    assert max(pools(2).run(rank_runs.run_labels, sizes)) <= TOLERANCE
