"""The gradient over ranks against one process with the whole batch, in float64."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import distributed_windows as cases
from support import full_batch_reference as ref
from support.process_pool import Pools
from support.tiers import slow

TOLERANCE = 1e-12

CUTS: dict[str, cases.Cut] = {
    "alike": [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]],
    "3 against 8 micro-batches": [[[0], [1], [2]], [[3], [4], [5], [6], [7], [8], [9], [10, 11]]],
    "one sample against eleven": [[[0]], [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]]],
    "a rank with nothing": [[], [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]]],
    "the first rank alone": [[[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]], []],
}
OVER_FOUR: cases.Cut = [[[0], [1, 2]], [], [[3, 4, 5, 6, 7]], [[8], [9], [10], [11]]]
KINDS = ("ddp", "plain", "fsdp", "fsdp-last")
LOSSES = ("loss_and_items", "mean_times_items", "terms_and_items")


def check(found_by_rank: list[cases.WindowResult]) -> None:
    first = found_by_rank[0].report
    for found in found_by_rank:
        assert found.error <= TOLERANCE
        assert found.norm_error <= TOLERANCE
        assert found.loss_error <= TOLERANCE
        assert (
            found.report.items,
            found.report.grad_norm,
            found.report.terms,
            found.report.ranks.num_microbatches,
        ) == (
            first.items,
            first.grad_norm,
            first.terms,
            first.ranks.num_microbatches,
        )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("name", CUTS)
def test_any_cut_over_two_ranks_is_exact(pools: Pools, how: str, name: str, loss: str) -> None:
    check(pools(2).run(cases.window_of, how, CUTS[name], loss))


@pytest.mark.parametrize("how", [*KINDS, "hsdp", slow("hsdp-shard"), slow("hsdp-every"), slow("hsdp-last")])
@pytest.mark.parametrize("loss", LOSSES)
def test_cut_over_four_ranks_is_exact(pools: Pools, how: str, loss: str) -> None:
    check(pools(4).run(cases.window_of, how, OVER_FOUR, loss))


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("size", [1, 3])
def test_rank_with_loss_and_zero_items_is_exact(pools: Pools, how: str, size: int) -> None:
    odd = (ref.ragged_batch(12)["labels"][:, 0] % 2 == 1).tolist()
    without = [row for row in range(12) if not odd[row]]
    assert 3 <= len(without) < 12
    check(
        pools(2).run(
            cases.window_of,
            how,
            [[without[:size], without[size:]], [[row for row in range(12) if odd[row]]]],
            "loss_over_odd",
        )
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("how", KINDS)
def test_engines_with_3_and_8_microbatches_are_exact(pools: Pools, how: str, loss: str) -> None:
    found = pools(2).run(cases.engine_of, how, [range(3), range(3, 11)], (1, 1), loss)
    check(found)
    assert found[0].report.ranks.num_microbatches == (3, 8)


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("limit", ["padded", "packed"])
def test_token_budgets_differing_by_rank_are_exact(pools: Pools, how: str, limit: str) -> None:
    check(
        pools(2).run(cases.engine_of, how, [[0, 3, 5], [1, 2, 4, 6, 7, 8, 9, 10, 11]], (6, 9), "loss_and_items", limit)
    )


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_engine_with_empty_rank_is_exact(pools: Pools, how: str, loss: str) -> None:
    check(pools(2).run(cases.engine_of, how, [[], range(12)], (4, 5), loss))


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), how=st.sampled_from(["plain", "ddp", "fsdp", "fsdp-last"]), loss=st.sampled_from(LOSSES))
def test_any_assignment_to_ranks_and_microbatches_is_exact(
    pools: Pools, data: st.DataObject, how: str, loss: str
) -> None:
    places = data.draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), min_size=12, max_size=12))
    cut: list[list[list[int]]] = [[[] for _ in range(4)] for _ in range(2)]
    for row, (rank, microbatch) in enumerate(places):
        cut[rank][microbatch].append(row)
    check(pools(2).run(cases.window_of, how, [[rows for rows in rank if rows] for rank in cut], loss))
