"""Windows whose reduction overlaps their last backward: as exact as others, and all or nothing if a rank fails."""

from typing import Any

import pytest
import torch

from distributed import overlap_cases
from distributed.overlap_cases import DEALS, MODELS, NUM_SENT, Run
from support.failing_ranks import PLACES, TOLERANCE
from support.process_pool import Pools
from support.tiers import slow, slow_except

HOWS = ("plain", "ddp")
WARNING = (
    "the last micro-batch of a window failed (OwnError: bad) while gradients were reduced over ranks. All ranks have "
    "dropped the window, and run it again without overlap."
)


def check_same(found: Run, expected: Run, *, bits: bool) -> None:
    assert found.overlapped == [False, True, True, True]
    assert expected.overlapped == [False] * 4
    assert found.gradients.keys() == expected.gradients.keys()
    for name, value in found.parameters.items():
        if bits:
            assert torch.equal(value, expected.parameters[name]), name
        else:
            torch.testing.assert_close(value, expected.parameters[name], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("size", [2, slow(3)])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("deal", DEALS)
def test_updates_equal_those_of_whole_batch(pools: Pools, size: int, how: str, deal: str) -> None:
    for found, expected, error in pools(size).run(overlap_cases.compared, how, "tokens", deal, torch.float64, {}):
        check_same(found, expected, bits=size == 2)  # more ranks add in an order that depends on the bucket
        assert error <= TOLERANCE


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in ("tokens", "checkpointed", "shifted")])
@pytest.mark.parametrize("deal", [slow("few and many"), "none on the last"])
def test_models_of_any_shape_are_exact(pools: Pools, kind: str, deal: str) -> None:
    settings = {"max_grad_norm": 0.3}
    for found, expected, error in pools(2).run(overlap_cases.compared, "plain", kind, deal, torch.float64, settings):
        check_same(found, expected, bits=True)
        assert error <= TOLERANCE
        assert overlap_cases.same_state(found, expected)


def test_gradients_that_share_memory_are_reduced_apart(pools: Pools) -> None:
    """Without clipping, which the plain torch of the reference would apply to the shared memory twice."""
    for found, expected, error in pools(2).run(
        overlap_cases.compared, "plain", "shifted", "one each", torch.float64, {}
    ):
        check_same(found, expected, bits=True)
        assert error <= TOLERANCE
        assert max(found.sent) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deal", ["equal", "one each", "none on the first"])
def test_narrow_weights_have_the_same_bits(pools: Pools, dtype: torch.dtype, deal: str) -> None:
    for found, expected, _ in pools(2).run(overlap_cases.compared, "plain", "tokens", deal, dtype, {}):
        check_same(found, expected, bits=True)


@pytest.mark.parametrize("kind", ["tokens", "tied", "tied later"])
@pytest.mark.parametrize("deal", ["equal", "one each"])
def test_fused_layers_have_the_same_bits(pools: Pools, kind: str, deal: str) -> None:
    settings = {"fuse_gradients": True}
    for found, expected, error in pools(2).run(overlap_cases.compared, "plain", kind, deal, torch.float64, settings):
        check_same(found, expected, bits=True)
        assert error <= TOLERANCE
        assert min(found.sent) >= (1 if kind == "tokens" else 0)


def test_noise_scale_is_that_without_overlap(pools: Pools) -> None:
    run = (overlap_cases.compared, "plain", "tokens", "few and many", torch.float64, {"noise": True})
    for found, expected, _ in pools(2).run(*run):
        check_same(found, expected, bits=True)
        assert found.noise == expected.noise
        assert found.noise


@pytest.mark.parametrize("deal", ["equal", "one each"])
def test_buckets_are_sent_before_backward_ends(pools: Pools, deal: str) -> None:
    for found in pools(2).run(overlap_cases.updates, "plain", "tokens", deal, True):
        assert found.sent == [4, 4, 4]  # all but the one of the last parameter


def test_hidden_leaves_are_sent_when_backward_has_ended(pools: Pools) -> None:
    for found, expected, error in pools(2).run(
        overlap_cases.compared, "plain", "checkpointed", "one each", torch.float64, {}
    ):
        assert found.overlapped == [False, True, True, True]
        assert found.sent == [0, 0, 0]
        assert error <= TOLERANCE
        for name, value in found.parameters.items():
            assert torch.equal(value, expected.parameters[name])


def test_window_has_one_small_collective_more(pools: Pools) -> None:
    for (votes, reductions, num_buckets), (votes_without, reductions_without, _) in zip(
        pools(2).run(overlap_cases.collectives, True), pools(2).run(overlap_cases.collectives, False), strict=True
    ):
        assert (votes, votes_without) == (2, 1)
        assert reductions == reductions_without == num_buckets > 1


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("size", [2, slow(6)])
@pytest.mark.parametrize("place", ["taking it", *NUM_SENT])
def test_failure_in_last_microbatch_runs_window_again(pools: Pools, how: str, size: int, place: str) -> None:
    expected = pools(2).run(overlap_cases.failing, how, "", "own", size)
    found = pools(2).run(overlap_cases.failing, how, place, "own", size)
    assert [each.kind for each in found] == ["", ""]
    assert [each.warned for each in found] == [[], [WARNING]]
    assert found[1].num_sent == NUM_SENT.get(place, 0)
    for mine, plain in zip(found, expected, strict=True):
        assert (mine.run.overlapped, plain.run.overlapped) == ([False, False, True], [False, True, True])
        assert mine.run.norms == plain.run.norms
        assert mine.num_measured == plain.num_measured - 1  # micro-batches that ran twice measure nothing
        assert overlap_cases.same_state(mine.run, plain.run)


@pytest.mark.parametrize("size", [2, slow(6)])
@pytest.mark.parametrize("place", ["taking it", *NUM_SENT])
def test_memory_in_last_microbatch_runs_window_again(pools: Pools, size: int, place: str) -> None:
    expected = pools(2).run(overlap_cases.failing, "plain", "", "memory", size)
    found = pools(2).run(overlap_cases.failing, "plain", place, "memory", size)
    assert [each.kind for each in found] == ["", ""]
    assert [each.retries for each in found] == [0, 1]
    assert [each.warned for each in found] == [[], []]
    first, plain = found[0].run, expected[0].run  # that of the other rank then has smaller micro-batches
    assert first.norms[:2] == plain.norms[:2]
    assert found[1].run.norms[:2] == expected[1].run.norms[:2]


@pytest.mark.parametrize("place", NUM_SENT)
@pytest.mark.parametrize("error", ["own", "memory"])
def test_fused_layers_are_run_again(pools: Pools, place: str, error: str) -> None:
    expected = pools(2).run(overlap_cases.failing_fused, "", error)
    found = pools(2).run(overlap_cases.failing_fused, place, error)
    for mine, plain in zip(found, expected, strict=True):
        assert mine.kind == ""
        assert (mine.run.overlapped, plain.run.overlapped) == ([False, False, True], [False, True, True])
        assert mine.run.norms[:2] == plain.run.norms[:2]


def test_failed_first_window_leaves_no_hooks(pools: Pools) -> None:
    ours, theirs = pools(2).run(overlap_cases.failing_first)
    assert (ours.kind, theirs.kind) == ("RankFailedError", "OwnError")
    assert ours.run.overlapped == theirs.run.overlapped == [False, True, True]


@pytest.mark.parametrize("place", ["taking it", *NUM_SENT])
def test_interrupt_in_last_microbatch_ends_window_everywhere(pools: Pools, place: str) -> None:
    ours, theirs = pools(2).run(overlap_cases.failing, "plain", place, "keyboard", 2, "tokens")
    assert theirs.kind == "KeyboardInterrupt"
    assert theirs.num_sent == NUM_SENT.get(place, 0)
    assert ours.kind == "RankFailedError"
    assert "rank 1 failed in the window after update 1, which changed nothing on any rank" in ours.message
    expected = pools(2).run(overlap_cases.failing, "plain", "", "own", 2, "tokens")
    for mine, plain in zip((ours, theirs), expected, strict=True):
        assert not mine.changed
        for name, value in mine.run.parameters.items():
            assert torch.equal(value, plain.run.parameters[name])


def test_written_batch_is_never_run_again(pools: Pools) -> None:
    ours, theirs = pools(2).run(overlap_cases.written_batch)
    assert ours[0] == theirs[0] == ours[2] == theirs[2] == "overlapped: False"  # written before the last micro-batch
    assert ours[1].startswith("RankFailedError")
    assert theirs[1] == "OwnError: bad"
    refused = (
        "WindowStateError: a rank failed in the last micro-batch of a window, and the window cannot be run again, "
        "because loss_fn has written to its micro-batches in place: let it make new tensors, such as x = x / 255 in "
        "place of x.div_(255)."
    )
    assert ours[3:] == [ours[3], refused, "overlapped: True"]
    assert theirs[3:] == [ours[3], refused, "overlapped: True"]


def test_frozen_layers_let_the_order_be_learned_again(pools: Pools) -> None:
    for overlapped in pools(2).run(overlap_cases.changed_parameters):
        assert overlapped == [False, True, False, False, True, False, False, True]


def test_layer_frozen_inside_window_is_exact(pools: Pools) -> None:
    for overlapped, error in pools(2).run(overlap_cases.frozen_inside):
        assert overlapped
        assert error <= TOLERANCE


def test_nan_of_a_loss_skips_window_everywhere(pools: Pools) -> None:
    for skipped, overlapped, changed in pools(2).run(overlap_cases.nan_window):
        assert skipped == [None, "non-finite gradient", None]
        assert overlapped == [False, True, True]
        assert not changed


@pytest.mark.parametrize("case", [overlap_cases.finished, overlap_cases.several_optimizers])
def test_other_updates_have_the_same_bits(pools: Pools, case: Any) -> None:
    for (overlapped, found), (_, expected) in zip(pools(2).run(case, True), pools(2).run(case, False), strict=True):
        assert overlapped[1:] == [True] * (len(overlapped) - 1)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name])


@pytest.mark.parametrize("what", ["lockstep", "reproducible", "offload", "float16", "exact batch norm", "own loop"])
def test_other_windows_do_not_overlap(pools: Pools, what: str) -> None:
    for overlapped in pools(2).run(overlap_cases.without_overlap, what):
        assert overlapped == [False] * 3


@pytest.mark.parametrize(("size", "how", "seed"), [(2, "ddp", 3), slow(3, "plain", 4)])
def test_updates_with_failures_equal_those_without(pools: Pools, size: int, how: str, seed: int) -> None:
    for found in pools(size).run(overlap_cases.failing_soak, how, 30, seed):
        assert len(found.failures) == 30
        assert found.differences == []
        assert found.largest_error <= TOLERANCE
        assert any(failure.overlaps for failure in found.failures)


@pytest.mark.parametrize(
    "place", slow_except(PLACES, "the loss", "memory in the backward", "before the vote", "launching a bucket")
)
def test_failure_at_each_place_is_lost_nowhere(pools: Pools, place: str) -> None:
    for found in pools(3).run(overlap_cases.failing_soak, "plain", 4, 2, (place,)):
        assert {failure.place for failure in found.failures} == {place}
        assert found.differences == []
