"""One rank fails at a random place of each window: every update is that of a run without failures, exactly once."""

import pytest

from distributed import failing_ranks_cases
from support.failing_ranks import IN_REDUCTION, PLACES, TOLERANCE, soak
from support.process_pool import Pools

NOT_SAME = (
    "update 2 was applied on rank 0 and not on rank 1, where it failed after the gradients were reduced, so the "
    "parameters of the ranks differ. Return to a checkpoint on all ranks: load_state_dict() of the engine, or of the "
    "model, optimizer and scheduler with a new Accumulator."
)
IN_SUM = (
    "rank 1 failed while the gradients of the ranks were added, and the window therefore changes nothing on any rank: "
    "see the error there."
)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "how", "seed"), [(2, "plain", 0), (3, "ddp", 1)])
def test_updates_with_failures_equal_those_without(pools: Pools, size: int, how: str, seed: int) -> None:
    for found in pools(size).run(soak, how, 30, seed):
        assert len(found.failures) == 30
        assert found.differences == []
        assert found.largest_error <= TOLERANCE


@pytest.mark.parametrize("place", PLACES)
def test_failure_at_each_place_is_lost_nowhere(pools: Pools, place: str) -> None:
    for found in pools(2).run(soak, "plain", 3, 2, (place,)):
        assert {failure.place for failure in found.failures} == {place}
        assert found.differences == []


@pytest.mark.parametrize("place", IN_REDUCTION)
@pytest.mark.parametrize("reproducible", [False, True])
def test_failure_within_reduction_reaches_all_ranks(pools: Pools, place: str, reproducible: bool) -> None:
    (ours, *_), (theirs, *_) = outcomes = pools(2).run(failing_ranks_cases.in_reduction, place, reproducible)
    assert theirs == f"InjectedError: in {place}"
    assert ours == f"RankFailedError: {IN_SUM}"
    assert all((changed, applied) == (False, True) for _, changed, applied in outcomes)


def test_failing_hook_of_shards_drops_window_everywhere(pools: Pools) -> None:
    (ours, *changed), (theirs, *others_changed) = pools(2).run(failing_ranks_cases.in_hook_of_shards)
    assert ours == ["skipped", "applied"]
    assert theirs == ["InjectedError: in the gradient hook", "applied"]
    assert changed == others_changed == [False]


def test_update_applied_on_one_rank_is_noticed(pools: Pools) -> None:
    ours, theirs = pools(2).run(failing_ranks_cases.in_hook)
    noticed = [f"TornUpdateError: {NOT_SAME}"] * 2
    assert ours == ["applied", *noticed, "applied"]
    assert theirs == ["InjectedError: in the gradient hook", *noticed, "applied"]


def test_float16_scale_survives_failed_reduction(pools: Pools) -> None:
    for before, after in pools(2).run(failing_ranks_cases.scale_after_reduction):
        assert after == before


def test_failed_reduction_without_items_hangs_nobody(pools: Pools) -> None:
    ours, theirs = pools(2).run(failing_ranks_cases.in_reduction_without_items)
    assert ours == ["skipped", "applied"]
    assert theirs == ["InjectedError: in launching a bucket", "applied"]


def test_torn_rank_opens_no_window_in_loop(pools: Pools) -> None:
    ours, theirs = pools(2).run(failing_ranks_cases.torn_loop)
    assert ours.startswith("TornUpdateError: update 2 was applied on rank 0 and not on rank 1")
    assert theirs.startswith("TornUpdateError: update 2 is torn: _FailingSGD.step() did not finish")
