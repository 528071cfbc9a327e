"""Finished gradients over ranks are those of one process, and a loss with collectives runs in lockstep."""

import pytest

from distributed import hand_over_cases as cases
from support.process_pool import Pools

EXACT = 1e-12


@pytest.mark.parametrize("how", ["ddp", "ddp static_graph", "ddp gradient_as_bucket_view", "plain", "fsdp"])
@pytest.mark.parametrize("sizes", [(3, 8), (7, 1)])
def test_unequal_ranks_deliver_global_gradient_once(pools: Pools, how: str, sizes: tuple[int, int]) -> None:
    for *errors, num_large in pools(2).run(cases.delivered, how, sizes):
        assert max(errors) <= EXACT
        assert num_large == 0  # nothing is reduced again


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_own_optimizer_trains_like_one_process(pools: Pools, how: str) -> None:
    assert max(pools(2).run(cases.trained_like_one_process, how, (5, 2))) <= EXACT


@pytest.mark.parametrize("how", ["ddp", "plain"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("sizes", [(6, 10), (9, 5)])
def test_collective_loss_runs_three_against_five(
    pools: Pools, how: str, backward: bool, sizes: tuple[int, int]
) -> None:
    for error, num_microbatches, calls in pools(2).run(_with_metrics, how, sizes, backward):
        assert error <= EXACT
        assert sorted(num_microbatches) == [3, 5]
        assert calls == 10  # two windows of five


def _with_metrics(how: str, sizes: tuple[int, int], backward: bool) -> tuple[float, list[int], int]:
    return cases.with_metrics(how, sizes, backward=backward)


def test_lockstep_changes_no_bit_of_bfloat16_gradients(pools: Pools) -> None:
    assert pools(2).run(cases.bfloat16_in_lockstep, (3, 9)) == [(True, 1.0)] * 2


def test_lockstep_needs_samples_on_each_rank(pools: Pools) -> None:
    message = (
        "rank 0 has had no micro-batch so far, and with lockstep=True a loss is computed on all ranks or on none: pass "
        "at least one sample to every rank in the first window."
    )
    assert pools(2).run(cases.without_samples_at_first) == [message] * 2


def test_lockstep_does_not_retry_out_of_memory(pools: Pools) -> None:
    message = (
        "memory ran out in a micro-batch of 2 samples (CUDA out of memory), and the other ranks that run in lockstep "
        "cannot wait for it to be split: start again from a checkpoint with smaller micro-batches"
    )
    assert pools(2).run(cases.memory_in_lockstep) == [message] * 2


def test_lockstep_refuses_auto(pools: Pools) -> None:
    message = (
        'microbatch="auto" tries sizes until one does not fit, and the ranks of lockstep=True cannot continue after '
        "that: pass a number of samples, or a TokenBudget."
    )
    assert pools(2).run(cases.refusals) == [[message]] * 2


def test_nonfinite_rank_makes_all_gradients_nan(pools: Pools) -> None:
    assert pools(2).run(cases.nonfinite_on_one_rank) == [(True, True)] * 2
