"""Several updates over ranks: parameters against one process, and bit-identical on all ranks."""

import pytest
import torch

from distributed import updates_cases
from support.process_pool import Pools
from support.tiers import slow

EXACT = 1e-10  # of parameters after some updates of AdamW, which amplifies rounding by the inverse of small gradients
TOLERANCE = 1e-12
REPLICATED = ("ddp", "plain")


def check_identical_ranks(trained: list[updates_cases.Trained]) -> None:
    for other in trained[1:]:
        assert all(torch.equal(trained[0].parameters[name], value) for name, value in other.parameters.items())
        assert all(torch.equal(trained[0].buffers[name], value) for name, value in other.buffers.items())
        assert other.grad_norms == trained[0].grad_norms


@pytest.mark.parametrize("kind", updates_cases.KINDS)
@pytest.mark.parametrize("how", REPLICATED)
def test_clipped_replicated_updates_match_one_process(pools: Pools, how: str, kind: str) -> None:
    trained = pools(2).run(updates_cases.train, how, kind, 6)
    check_identical_ranks(trained)
    for one in trained:
        assert one.error <= EXACT
        assert one.grad_norms == pytest.approx(one.expected_norms, rel=EXACT)
        assert max(one.grad_norms) > 0.3  # some were clipped


@pytest.mark.parametrize("how", ["fsdp", "fsdp-last", slow("hsdp-shard"), "hsdp-every", slow("hsdp-last")])
def test_clipped_sharded_updates_match_one_process(pools: Pools, how: str) -> None:
    trained = pools(4 if how.startswith("hsdp") else 2).run(updates_cases.train, how, "tokens", 5)
    check_identical_ranks(trained)
    for one in trained:
        assert one.error <= EXACT
        assert one.grad_norms == pytest.approx(one.expected_norms, rel=EXACT)


@pytest.mark.parametrize("how", REPLICATED)
def test_twenty_updates_keep_four_ranks_bit_identical(pools: Pools, how: str) -> None:
    trained = pools(4).run(updates_cases.train, how, "tied", 20)
    check_identical_ranks(trained)
    assert all(one.error <= 10 * EXACT for one in trained)


@pytest.mark.parametrize("how", REPLICATED)
def test_bfloat16_parameters_stay_bit_identical(pools: Pools, how: str) -> None:
    trained = pools(2).run(updates_cases.train, how, "tokens", 20, torch.bfloat16)
    check_identical_ranks(trained)


@pytest.mark.parametrize("how", REPLICATED)
def test_bfloat16_gradients_are_summed_over_ranks_in_float32(pools: Pools, how: str) -> None:
    results = pools(2).run(updates_cases.narrow_sums, how)
    for error, naive_error, found in results:
        # The same micro-gradients in another order: a float32 sum then rounds to another bfloat16 once in 2**-14 cases.
        assert error < 2**-13
        assert naive_error > 2**-8
        assert all(torch.equal(found[name], gradient) for name, gradient in results[0][2].items())


def test_sharded_bfloat16_gradients_are_summed_in_float32(pools: Pools) -> None:
    for error, naive_error, _ in pools(2).run(updates_cases.narrow_sums, "fsdp"):
        # FSDP rounds each mean over the two ranks by up to 2**-9, so that some sums round to the next bfloat16.
        assert error < 2**-8
        assert naive_error > 2**-8


@pytest.mark.parametrize("how", REPLICATED)
def test_scaler_backs_off_on_all_ranks_despite_prescales(pools: Pools, how: str) -> None:
    results = pools(2).run(updates_cases.scaled, how)
    for skipped, (error, scale), parameters in results:
        assert skipped == [1.0, 0.0, 0.0]
        assert scale == 2.0**10
        assert error < 2**-8  # float16 rounds by 2**-11
        assert all(torch.equal(results[0][2][name], value) for name, value in parameters.items())


@pytest.mark.parametrize("how", REPLICATED)
def test_unfrozen_parameters_are_summed_over_ranks(pools: Pools, how: str) -> None:
    assert max(pools(2).run(updates_cases.unfreezing, how)) <= EXACT


@pytest.mark.parametrize("how", REPLICATED)
def test_only_parameters_used_on_any_rank_have_gradients(pools: Pools, how: str) -> None:
    for error, found, expected in pools(2).run(updates_cases.deep, how):
        assert error <= TOLERANCE
        assert found == expected
        assert 2 < len(expected) < 122


@pytest.mark.parametrize("how", REPLICATED)
def test_sparse_gradients_are_rejected_on_all_ranks(pools: Pools, how: str) -> None:
    for kind, message in pools(2).run(updates_cases.sparse, how):
        assert kind == "TypeError"
        assert message == (
            "a gradient is sparse, and gradients are reduced over ranks as dense tensors: use embeddings with "
            "sparse=False."
        )


@pytest.mark.parametrize(("how", "settings"), [("ddp", {}), ("plain", {}), ("ddp", {"static_graph": True})])
def test_overlapping_windows_over_replicated_model_are_exact(pools: Pools, how: str, settings: dict[str, bool]) -> None:
    for error, before, after in pools(2).run(updates_cases.overlapping_accumulators, how, settings):
        assert error <= TOLERANCE
        assert before == after
