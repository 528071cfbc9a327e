"""Offload on two ranks that hold the whole model."""

import pytest

from offload import rank_runs
from support.process_pool import Pools


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_ranks_have_equal_bits(pools: Pools, name: str):
    plain = pools(2).run(rank_runs.train, name, "none", 6)
    streamed = pools(2).run(rank_runs.train, name, "optimizer", 6)
    assert all(each["copies"] > 0 for each in streamed)
    assert [(each["values"], each["states"]) for each in streamed] == [(e["values"], e["states"]) for e in plain]
    assert streamed[0]["values"] == streamed[1]["values"]


def test_wrapped_model_has_equal_bits(pools: Pools):
    plain = pools(2).run(rank_runs.train_wrapped, "none", 5)
    streamed = pools(2).run(rank_runs.train_wrapped, "optimizer", 5)
    assert streamed == plain
    assert streamed[0] == streamed[1]
