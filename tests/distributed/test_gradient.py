"""The gradient of ranks beside that of one process with the whole batch, in float64."""

from collections.abc import Callable

import pytest
from tests.distributed import cases
from tests.distributed.pool import Pool

TOLERANCE = 1e-12

CUTS: dict[str, cases.Cut] = {
    "alike": [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]],
    "3 against 8 micro-batches": [[[0], [1], [2]], [[3], [4], [5], [6], [7], [8], [9], [10, 11]]],
    "one sample against eleven": [[[0]], [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]]],
    "a rank with nothing": [[], [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]]],
    "the first rank alone": [[[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]], []],
}
KINDS = ("ddp", "plain", "fsdp", "fsdp-last")


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("name", CUTS)
def test_every_cut_over_two_ranks_gives_the_gradient_of_the_whole_batch(
    pools: Callable[[int], Pool], how: str, name: str
) -> None:
    for found in pools(2).run(cases.window_of, how, CUTS[name]):
        assert found.error <= TOLERANCE
        assert found.norm_error <= TOLERANCE
        assert found.loss_error <= TOLERANCE
        assert found.report.items == found.report.items
