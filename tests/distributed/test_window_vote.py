"""One rank fails: it raises its own error, the others RankFailedError; no state changes, the next window is exact."""

import pytest

from distributed import window_vote_cases
from support import distributed_windows as cases
from support import full_batch_reference as ref
from support.process_pool import Pools

TOLERANCE = 1e-12
REPLICATED = ("ddp", "plain")
ENGINES = (*REPLICATED, "overlap")
IN_WINDOW = "rank 1 failed in the window after update 1, which changed nothing on any rank: see the error there"
BEFORE_WINDOW = "rank 1 failed before the window, which therefore changes nothing on any rank"


def check(endings: list[window_vote_cases.WindowOutcome], kind: str, message: str, others_message: str) -> None:
    ours, theirs = endings
    assert (theirs.kind, theirs.message) == (kind, theirs.message)
    assert message in theirs.message
    assert ours.kind == "RankFailedError"
    assert others_message in ours.message
    for ending in endings:
        assert ending.changed == []
        assert ending.next_error <= TOLERANCE


@pytest.mark.parametrize("how", ENGINES)
@pytest.mark.parametrize(
    ("place", "kind", "message"),
    [
        ("forward", "OwnError", "the second micro-batch is bad"),
        ("backward", "OwnError", "half-way through backward"),
        ("keyboard", "KeyboardInterrupt", ""),
        ("shape", "ValueError", "the loss of the term 'loss' has shape (1,)"),
        ("collate", "OwnError", "these do not go together"),
        ("batch", "TypeError", "with collate= the batch must be a list of samples"),
        ("lengths", "OwnError", "no lengths"),
        ("give_up raises", "OwnError", "asked too much"),
        ("stopping raises", "OwnError", "do not stop me"),
    ],
)
def test_engine_failure_on_one_rank_reaches_all_ranks(
    pools: Pools, how: str, place: str, kind: str, message: str
) -> None:
    check(pools(2).run(window_vote_cases.engine_outcome, how, place), kind, message, IN_WINDOW)


@pytest.mark.parametrize("how", [*ENGINES, "fsdp", "fsdp-last"])
def test_failing_counts_on_one_rank_end_window_early(pools: Pools, how: str) -> None:
    check(pools(2).run(window_vote_cases.engine_outcome, how, "count_items"), "OwnError", "no counts", BEFORE_WINDOW)


@pytest.mark.parametrize("how", ["fsdp", "fsdp-last"])
@pytest.mark.parametrize("place", ["batch", "lengths"])
def test_sharded_split_error_is_shared_before_any_layer(pools: Pools, how: str, place: str) -> None:
    kind, message = {"batch": ("TypeError", "must be a list"), "lengths": ("OwnError", "no lengths")}[place]
    check(pools(2).run(window_vote_cases.engine_outcome, how, place), kind, message, BEFORE_WINDOW)


@pytest.mark.parametrize("how", REPLICATED)
@pytest.mark.parametrize(
    ("place", "kind", "message", "others_message"),
    [
        ("body", "OwnError", "in the body of the loop", IN_WINDOW),
        ("keyboard", "KeyboardInterrupt", "", IN_WINDOW),
        ("later draw", "OwnError", "no micro-batch 1", IN_WINDOW),
        ("first draw", "OwnError", "no micro-batch 0", BEFORE_WINDOW),
        ("count_items", "OwnError", "no counts", BEFORE_WINDOW),
        ("no step", "WindowStateError", "a window is still open and holds the gradients of 3 micro-batches", IN_WINDOW),
    ],
)
def test_loop_failure_on_one_rank_reaches_all_ranks(
    pools: Pools, how: str, place: str, kind: str, message: str, others_message: str
) -> None:
    check(pools(2).run(window_vote_cases.loop_outcome, how, place), kind, message, others_message)


@pytest.mark.parametrize("how", ["fsdp", "fsdp-last"])
@pytest.mark.parametrize("place", ["first draw", "later draw", "count_items"])
def test_sharded_loader_error_is_shared_before_any_layer(pools: Pools, how: str, place: str) -> None:
    message = {"first draw": "no micro-batch 0", "later draw": "no micro-batch 1", "count_items": "no counts"}[place]
    check(pools(2).run(window_vote_cases.loop_outcome, how, place), "OwnError", message, BEFORE_WINDOW)


@pytest.mark.parametrize(
    ("how", "place"),
    [("ddp", "abort"), ("plain", "abort"), ("ddp", "late abort"), ("fsdp", "late abort"), ("fsdp-last", "late abort")],
)
def test_abort_on_one_rank_changes_nothing_anywhere(pools: Pools, how: str, place: str) -> None:
    ours, theirs = endings = pools(2).run(window_vote_cases.loop_outcome, how, place)
    assert theirs.kind == ""
    assert ours.kind == "RankFailedError"
    assert IN_WINDOW in ours.message
    for ending in endings:
        assert ending.changed == []
        assert ending.next_error <= TOLERANCE


@pytest.mark.parametrize("how", [*REPLICATED, "fsdp", "fsdp-last", "mixed", "mixed-last"])
def test_abort_on_all_ranks_leaves_nothing_behind(pools: Pools, how: str) -> None:
    for changed, error in pools(2).run(window_vote_cases.abort_on_all_ranks, how):
        assert changed == []
        assert error <= (1e-6 if how.startswith("mixed") else TOLERANCE)  # layers then compute in float32


@pytest.mark.parametrize("how", ["hsdp-shard", "hsdp-last"])
def test_abort_of_hybrid_shards_leaves_nothing_behind(pools: Pools, how: str) -> None:
    for changed, error in pools(4).run(window_vote_cases.abort_on_all_ranks, how):
        assert changed == []
        assert error <= TOLERANCE


@pytest.mark.parametrize("how", REPLICATED)
def test_loop_continues_after_abort_on_one_rank(pools: Pools, how: str) -> None:
    (first, seen, num_steps), (second, *_) = pools(2).run(window_vote_cases.abort_in_loop, how)
    assert first == ["closed", "rank failed", "closed"]
    assert second == ["closed", "aborted", "closed"]
    assert num_steps == 2
    batch = ref.ragged_batch(12)
    for found, rows in zip(seen, [range(4), range(8, 12)], strict=True):
        expected = ref.full_gradient(ref.make_model(), cases.select_rows(batch, rows))
        assert ref.relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("how", [*ENGINES, "fsdp", "fsdp-last"])
def test_nan_loss_on_one_rank_skips_all(pools: Pools, how: str) -> None:
    for ending in pools(2).run(window_vote_cases.engine_outcome, how, "nonfinite skip"):
        assert ending.kind == "OwnError"
        assert ending.message == "skipped: non-finite gradient, stopping: False"
        assert ending.changed == []
        assert ending.next_error <= TOLERANCE


@pytest.mark.parametrize("how", [*ENGINES, "fsdp", "fsdp-last"])
def test_nan_loss_on_one_rank_raises_when_requested(pools: Pools, how: str) -> None:
    for ending in pools(2).run(window_vote_cases.engine_outcome, how, "nonfinite raise"):
        assert ending.kind == "NonFiniteError"
        assert "the window after update 1 has a non-finite gradient, and changed nothing" in ending.message
        assert ending.changed == []
        assert ending.next_error <= TOLERANCE


@pytest.mark.parametrize("how", [*ENGINES, "fsdp", "fsdp-last"])
def test_window_abandoned_on_one_rank_is_dropped_everywhere(pools: Pools, how: str) -> None:
    for ending in pools(2).run(window_vote_cases.engine_outcome, how, "give_up"):
        assert ending.kind == "WindowAbandonedError"
        assert ending.message == "the window was abandoned on rank 1."
        assert ending.changed == []
        assert ending.next_error <= TOLERANCE


@pytest.mark.parametrize("how", [*ENGINES, "fsdp", "fsdp-last"])
def test_stop_request_of_one_rank_reaches_all_ranks(pools: Pools, how: str) -> None:
    for ending in pools(2).run(window_vote_cases.engine_outcome, how, "stopping"):
        assert ending.message == "skipped: None, stopping: True"
        assert ending.changed
        assert ending.next_error <= TOLERANCE


@pytest.mark.parametrize("how", ["fsdp", "fsdp-last"])
def test_stop_check_error_after_layers_reaches_all_ranks(pools: Pools, how: str) -> None:
    check(
        pools(2).run(window_vote_cases.engine_outcome, how, "stopping raises"), "OwnError", "do not stop me", IN_WINDOW
    )
