"""Fused linear layers over several ranks: exact in replicated models, refused in sharded ones."""

import pytest

from distributed import fused_gradients_cases
from support.process_pool import Pools

TOLERANCE = 1e-12


@pytest.mark.parametrize("how", ["ddp", "plain"])
@pytest.mark.parametrize("fail_at", [0, 1, 2, 5])
def test_replicated_update_is_exact(pools: Pools, how: str, fail_at: int) -> None:
    ours, theirs = pools(2).run(fused_gradients_cases.update, how, fail_at, False)
    assert max(ours[0], theirs[0]) <= TOLERANCE
    assert 0 < ours[1] < theirs[1]
    assert (ours[2], theirs[2]) == (0, int(fail_at > 0))


def test_padding_microbatch_adds_nothing(pools: Pools) -> None:
    results = pools(2).run(fused_gradients_cases.update, "plain", 0, True)
    assert max(error for error, _, _ in results) <= TOLERANCE


def test_sharded_model_is_refused(pools: Pools) -> None:
    reason = "the weights of a sharded model are gathered for each layer, and their gradients reduced after it"
    assert pools(2).run(fused_gradients_cases.refusal, "fsdp", "auto") == [reason] * 2
    expected = f"fuse_gradients=True can fuse nothing: {reason}; leave it out."
    assert pools(2).run(fused_gradients_cases.refusal, "fsdp", True) == [expected] * 2
