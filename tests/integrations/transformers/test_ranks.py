"""Updates of a Trainer on two ranks are those of the whole batch of both."""

import pytest

from integrations.transformers import ranks_cases as cases
from support.process_pool import Pools

EXACT = 1e-12
EXACT_IN_FLOAT32_NORMS = 1e-6


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize(("number", "size", "even"), [(48, 4, True), (40, 4, True), (36, 4, False)])
def test_each_window_has_whole_batch_gradient(pools: Pools, number: int, size: int, even: bool, auto: bool):
    for errors, *_ in pools(2).run(cases.ddp, number, size, even, None, False, auto):
        assert len(errors) == 2
        assert max(errors) <= EXACT


@pytest.mark.parametrize("gathers", [False, True])
def test_ranks_run_different_micro_batches(pools: Pools, gathers: bool):
    for errors, _, both in pools(2).run(cases.ddp, 48, 4, True, 14, gathers, True):
        assert max(errors) <= EXACT
        assert both == [4, 6]


def test_out_of_memory_on_one_rank_is_exact(pools: Pools):
    for errors, *_ in pools(2).run(cases.out_of_memory, False):
        assert max(errors) <= EXACT


def test_micro_batches_for_memory_are_exact(pools: Pools):
    for errors, _, both in pools(2).run(cases.out_of_memory, True):
        assert max(errors) <= EXACT
        assert max(both) <= 3


@pytest.mark.parametrize("budget", [None, 14])
@pytest.mark.parametrize("auto", [False, True])
def test_sharded_model_has_whole_batch_gradient(pools: Pools, budget: int | None, auto: bool):
    for errors, own, both in pools(2).run(cases.fsdp, budget, auto):
        assert max(errors) <= EXACT
        assert both == ([3, 3] if budget is None else [4, 6])
        assert own in both


EQUAL_MEANS = {
    "dpo": {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"},
    "reward": {"min_reward", "mean_reward", "max_reward", "accuracy", "margin"},
    "sft": {"entropy", "mean_token_accuracy"},
}


@pytest.mark.parametrize(
    ("kind", "budget", "counts"), [("dpo", 70, [3, 5]), ("reward", 90, [3, 5]), ("sft", 40, [3, 6])]
)
def test_trl_runs_three_against_five(pools: Pools, kind: str, budget: int, counts: list[int]):
    found = pools(2).run(cases.with_trl, kind, budget)
    for errors, both, _, _ in found:
        assert max(errors) <= EXACT_IN_FLOAT32_NORMS
        assert both == counts
    (*_, logs, whole), (*_, others, _) = found
    assert logs == others
    for name in EQUAL_MEANS[kind]:
        assert logs[0][name] == pytest.approx(whole[name], rel=1e-4), name


def test_repeated_samples_are_warned_of(pools: Pools):
    message = (
        "30 samples do not fill the last batches of 4 samples on 2 ranks, so 2 of them count twice in each epoch: set "
        'dataloader_drop_last=True, or accelerator_config={"even_batches": False}.'
    )
    assert pools(2).run(cases.repeated) == [[message], []]


def test_uneven_updates_are_refused(pools: Pools):
    message = (
        '"even_batches": False gives some of 2 ranks 2 updates in an epoch and others 1, and they would wait for each '
        "other: set it to True, or use a number of samples other than 28."
    )
    assert pools(2).run(cases.uneven_updates) == [message] * 2


def test_dispatched_batches_are_refused(pools: Pools):
    message = (
        "MeanLoss reads batches on the first of 2 ranks and sends slices of their tensors to the others: set "
        'accelerator_config={"dispatch_batches": False}.'
    )
    assert pools(2).run(cases.dispatched) == [message] * 2
