"""Gradients at the optimizer of accelerate's loops are those of the whole batch."""

import pytest
from accelerate.utils import GradientAccumulationPlugin

from bigbatch.integrations.item_totals import AccumulationReport
from integrations import accelerate_cases as cases
from support.process_pool import Pools

EXACT = 1e-12
WRONG = 0.1


def test_every_window_has_whole_batch_gradient():
    found = cases.run_loop({"gradient_accumulation_steps": cases.STEPS}, exact=True)
    assert max(found) <= EXACT


def test_stock_accelerator_is_wrong_on_this_data():
    found = cases.run_loop({"gradient_accumulation_steps": cases.STEPS}, exact=False)
    assert min(found) >= WRONG


@pytest.mark.parametrize("how", ["accumulate", "sync each batch", "no_sync"])
def test_two_ranks_have_whole_batch_gradient(pools: Pools, how: str):
    for found in pools(2).run(_exact, how):
        assert max(found) <= EXACT


def test_stock_ranks_are_wrong_on_this_data(pools: Pools):
    for found in pools(2).run(_stock):
        assert min(found) >= WRONG


def _exact(how: str) -> list[float]:
    if how == "sync each batch":
        plugin = GradientAccumulationPlugin(num_steps=cases.STEPS, sync_each_batch=True)
        return cases.run_loop({"gradient_accumulation_plugin": plugin}, exact=True)
    steps = cases.STEPS if how == "accumulate" else 1
    return cases.run_loop({"gradient_accumulation_steps": steps}, exact=True, how=how)


def _stock() -> list[float]:
    return cases.run_loop({"gradient_accumulation_steps": cases.STEPS}, exact=False)


@pytest.mark.parametrize("each", [False, True])
def test_sharded_ranks_have_whole_batch_gradient(pools: Pools, each: bool):
    plugin = GradientAccumulationPlugin(num_steps=cases.STEPS, sync_each_batch=each)
    for found, num_sharded in pools(2).run(cases.run_sharded, plugin):
        assert num_sharded == 7
        assert max(found) <= EXACT


def test_report_is_printed_with_items_and_loss():
    assert repr(AccumulationReport(3, 4, 10.0)) == "AccumulationReport(num_microbatches=3, items=4, loss=2.5)"
