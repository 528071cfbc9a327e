"""Gradients at the optimizer of Lightning's trainer are those of the whole batch."""

from integrations import lightning_cases as cases
from support.process_pool import Pools

EXACT = 1e-12
WRONG = 0.1


def test_every_window_has_whole_batch_gradient():
    assert max(cases.run(True)) <= EXACT


def test_stock_trainer_is_wrong_on_this_data():
    found = cases.run(False)
    assert len(found) == 3
    assert min(found) >= WRONG


def test_two_ranks_have_whole_batch_gradient(pools: Pools):
    for found in pools(2).run(cases.run, True):
        assert len(found) == 3
        assert max(found) <= EXACT


def test_stock_ranks_are_wrong_on_this_data(pools: Pools):
    for found in pools(2).run(cases.run, False):
        assert min(found) >= WRONG
