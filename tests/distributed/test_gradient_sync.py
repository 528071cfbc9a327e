"""Collectives between ranks per window, the supported parallel wrappers, and the refused ones."""

from typing import Any

import pytest

from distributed import gradient_sync_cases
from support import full_batch_reference as ref
from support.process_pool import Pools

TOLERANCE = 1e-12
REPLICATED = ("ddp", "plain")
SETTINGS: list[dict[str, Any]] = [
    {},
    {"gradient_as_bucket_view": True},
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"static_graph": True, "gradient_as_bucket_view": True, "find_unused_parameters": True},
]


@pytest.mark.parametrize("how", REPLICATED)
@pytest.mark.parametrize("several", [False, True])
def test_gradients_are_reduced_once_per_update(pools: Pools, how: str, several: bool) -> None:
    for size in (6, 2, 1):
        for small, large, syncs in pools(2).run(gradient_sync_cases.collectives_of_engine, how, size, several):
            assert large == {"allreduce_": 1}  # all gradients of this model fit in one bucket
            assert small.total() == 1 + several
            assert syncs == 1


@pytest.mark.parametrize("how", REPLICATED)
@pytest.mark.parametrize("several", [False, True])
def test_loop_window_sends_gradients_and_two_small_messages(pools: Pools, how: str, several: bool) -> None:
    for num_microbatches in (1, 3, 8):
        for small, large in pools(2).run(gradient_sync_cases.collectives_of_loop, how, num_microbatches, several):
            assert large == {"allreduce_": 1}
            assert small.total() == 2


def test_naive_ddp_reduces_every_microbatch(pools: Pools) -> None:
    for num_microbatches in (1, 3, 8):
        for large in pools(2).run(gradient_sync_cases.collectives_of_naive_ddp, num_microbatches):
            assert large.total() == num_microbatches


def test_sharded_model_reduces_as_its_policy_says(pools: Pools) -> None:
    counts = {}
    for how in ("fsdp-every", "fsdp-last"):
        (_, large, syncs), *_ = pools(2).run(gradient_sync_cases.collectives_of_engine, how, 2)
        counts[how] = sum(number for name, number in large.items() if "reduce_scatter" in name)
        assert syncs == {"fsdp-every": 3, "fsdp-last": 1}[how]
    assert counts["fsdp-every"] == 3 * counts["fsdp-last"]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("used_before", [False, True])
def test_ddp_with_any_settings_is_exact_and_restored(pools: Pools, settings: dict[str, Any], used_before: bool) -> None:
    for errors, kept, num_large in pools(2).run(gradient_sync_cases.with_settings, settings, used_before):
        assert max(errors) <= TOLERANCE
        assert kept
        assert num_large == 1


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_ddp_reduces_by_itself_after_window(pools: Pools, settings: dict[str, Any]) -> None:
    assert max(pools(2).run(gradient_sync_cases.ddp_after_windows, settings)) <= TOLERANCE


def test_compiled_ddp_is_recognised(pools: Pools) -> None:
    assert max(pools(2).run(gradient_sync_cases.compiled)) <= TOLERANCE


def test_two_pairs_of_ranks_train_independently(pools: Pools) -> None:
    for rank, (error, report) in enumerate(pools(4).run(gradient_sync_cases.sub_group)):
        assert error <= TOLERANCE
        assert report.ranks.size == 2
        assert report.items == ref.count(ref.ragged_batch(7, seed=rank // 2))


@pytest.mark.parametrize("how", ["ddp", "plain", "fsdp", "fsdp-every", "fsdp-last"])
def test_single_rank_world_is_exact_and_sends_nothing(pools: Pools, how: str) -> None:
    (results,) = pools(1).run(gradient_sync_cases.alone, how)
    for found in results:
        assert max(found.error, found.norm_error, found.loss_error) <= TOLERANCE
        assert found.report.ranks is None
        if how in REPLICATED:
            assert not found.large
            assert not found.small


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        (
            "auto",
            "ValueError",
            'microbatch="auto" tries sizes until one does not fit, and the ranks of a sharded',
        ),
        (
            "every for ddp",
            "ValueError",
            "sync is SyncPolicy.EVERY, which is for models that are sharded: leave it",
        ),
        ("shard for one dimension", "ValueError", "this model has no replicas: use LAST or EVERY."),
        ("another model", "ValueError", "sync= was made for another object (TokenModel) than the model (TokenModel)"),
        (
            "inner model",
            "ValueError",
            "(TokenModel) than the model (DistributedDataParallel): make it for the model that is passed",
        ),
        (
            "part in ddp",
            "TypeError",
            "only a part of the model is wrapped in DistributedDataParallel: wrap the whole model",
        ),
        ("data parallel", "TypeError", "the model is wrapped in DataParallel: use one process a GPU"),
        ("a name", "TypeError", "sync is 'ddp': pass a bigbatch.SyncPolicy, a bigbatch.Replicated(model), or None."),
        ("replicated of a sharded model", "TypeError", "the model is sharded by fully_shard: leave sync= out"),
        ("scaler for shards", "TypeError", "a sharded model averages gradients over ranks before a window could scale"),
        (
            "narrow sums",
            "ValueError",
            "sync=SyncPolicy.LAST would sum the gradients of micro-batches in torch.b",
        ),
        (
            "nothing at first",
            "ValueError",
            "rank 0 has had no micro-batch so far, and the layers of a sharded model run on",
        ),
        ("two windows", "WindowStateError", "another window over the same sharded model is open"),
        ("nine terms", "ValueError", "the loss has 9 terms, and at most 8 are supported over several ranks."),
        (
            "other terms",
            "ValueError",
            "the ranks have different terms of the loss (number of terms on rank 0: 1,",
        ),
    ],
)
def test_invalid_setups_are_rejected_on_all_ranks(pools: Pools, what: str, kind: str, message: str) -> None:
    for found, told in pools(2).run(gradient_sync_cases.refusal, what):
        assert (found, message in told) == (kind, True), told


@pytest.mark.parametrize("how", REPLICATED)
def test_first_rank_chooses_microbatch_for_all(pools: Pools, how: str) -> None:
    results = pools(2).run(gradient_sync_cases.auto, how)
    for kind, message, choice, error in results:
        assert (kind, message) == ("", "")
        assert choice == results[0][2]
        assert choice is not None
        assert error <= TOLERANCE


@pytest.mark.parametrize("fails", ["memory", "other"])
def test_failed_choice_reaches_all_ranks_and_is_repeatable(pools: Pools, fails: str) -> None:
    first, second = pools(2).run(gradient_sync_cases.auto, "plain", fails)
    assert (first[0], second[0]) == {
        "memory": ("MemoryLimitError", "MemoryLimitError"),
        "other": ("ArithmeticError", "RankFailedError"),
    }[fails]
    assert first[1] in second[1]
    assert first[2] == second[2] is not None
    assert max(first[3], second[3]) <= TOLERANCE


@pytest.mark.parametrize("how", ["ddp", "plain", "fsdp"])
def test_reports_are_aggregated_over_all_ranks(pools: Pools, how: str) -> None:
    ours, theirs = pools(2).run(gradient_sync_cases.reports, how)
    batch = ref.ragged_batch(12)
    for report in (ours, theirs):
        assert report.items == report.terms["loss"].items == ref.count(batch)
        assert report.tokens == 12 * ref.LENGTH
        assert report.loss == pytest.approx(ref.loss_mean(ref.make_model(), batch).item(), rel=TOLERANCE)
        assert report.ranks == ours.ranks
        assert report.peak_bytes == ours.peak_bytes
        assert report.step == 2
        assert report.skipped is None
    assert (ours.num_microbatches, theirs.num_microbatches) == ours.ranks.num_microbatches == (2, 5)
    assert ours.ranks.size == 2
    assert ours.ranks.stopping
    assert ours.ranks.slowest in (0, 1)
    assert 0 <= ours.ranks.slowest_share < 1


@pytest.mark.parametrize("how", [*REPLICATED, "fsdp", "fsdp-last"])
def test_ranks_using_different_layers_run_both_backwards(pools: Pools, how: str) -> None:
    assert max(pools(2).run(gradient_sync_cases.two_heads, how)) <= TOLERANCE


@pytest.mark.parametrize("how", [*REPLICATED, "fsdp", "fsdp-last"])
def test_model_called_twice_is_exact_with_empty_microbatches(pools: Pools, how: str) -> None:
    assert max(pools(2).run(gradient_sync_cases.called_twice, how)) <= TOLERANCE


@pytest.mark.parametrize("how", [*REPLICATED, "fsdp", "fsdp-last"])
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_failure_inside_layer_leaves_next_window_clean(pools: Pools, how: str, place: str) -> None:
    for errors in pools(2).run(gradient_sync_cases.failing_on_all, how, place):
        if how.startswith("fsdp") and place == "backward":
            assert errors == (
                "a backward of the sharded model failed, and FSDP cannot continue after that: start again from a "
                "checkpoint, with a model that fully_shard was newly applied to."
            )
        else:
            assert max(errors) <= TOLERANCE


def test_plain_model_among_ranks_warns(pools: Pools) -> None:
    for said in pools(2).run(gradient_sync_cases.warnings_of_plain_model, False):
        assert said == [
            "the model (TokenModel) is not distributed, and this process is one of 2 ranks: each rank trains by "
            "itself, and gradients are not reduced. Pass sync=bigbatch.Replicated(model), or a model that is wrapped "
            "in DistributedDataParallel or to which fully_shard was applied."
        ]
    assert pools(2).run(gradient_sync_cases.warnings_of_plain_model, True) == [[], []]
