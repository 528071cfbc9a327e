"""Updates of a Trainer on two ranks are those of the whole batch of both."""

import pytest

from integrations.transformers import ranks_cases as cases
from support.process_pool import Pools
from support.tiers import slow

EXACT = 1e-12
EXACT_IN_FLOAT32_NORMS = 1e-6


@pytest.mark.parametrize(
    ("number", "size", "even", "auto"), [slow(48, 4, True, False), (40, 4, True, True), slow(36, 4, False, True)]
)
def test_each_window_has_whole_batch_gradient(pools: Pools, number: int, size: int, even: bool, auto: bool):
    for errors, *_ in pools(2).run(cases.ddp, number, size, even, None, False, auto):
        assert len(errors) == 2
        assert max(errors) <= EXACT


def test_ranks_run_different_micro_batches(pools: Pools):
    for errors, _, both in pools(2).run(cases.ddp, 48, 4, True, 14, True, True):
        assert max(errors) <= EXACT
        assert both == [4, 6]


def test_out_of_memory_on_one_rank_is_exact(pools: Pools):
    for errors, *_ in pools(2).run(cases.out_of_memory, False):
        assert max(errors) <= EXACT


def test_micro_batches_for_memory_are_exact(pools: Pools):
    for errors, _, both in pools(2).run(cases.out_of_memory, True):
        assert max(errors) <= EXACT
        assert max(both) <= 3


@pytest.mark.parametrize(("budget", "auto"), [(None, False), (14, True)])
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
    ("kind", "budget", "counts"), [("dpo", 70, [3, 5]), slow("reward", 90, [3, 5]), slow("sft", 40, [3, 6])]
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


def test_uncuttable_batches_are_refused_on_all_ranks(pools: Pools):
    message = (
        "the train dataloader yields batches that are collated already, and they cannot be cut into rows to find out "
        "what the loss is averaged over: pass items=, a function from a batch to the number that the loss is averaged "
        "over."
    )
    assert pools(2).run(cases.uncuttable) == [message] * 2


def test_loss_that_calls_collectives_runs_in_lockstep(pools: Pools):
    for errors, *_ in pools(2).run(cases.reduces, cases.ReducesMetrics, 36, False, None, True):
        assert max(errors) <= EXACT


def test_loss_that_calls_collectives_refuses_token_budgets(pools: Pools):
    message = (
        "the loss of ReducesMetrics (TokenModel) calls torch.distributed, so all ranks must run micro-batches of as "
        'many samples, which a TokenBudget, microbatch="auto" and memory= do not give: pass microbatch= a number of '
        "samples, or communicate by trainer.accelerator, which returns the values of this rank inside a window."
    )
    assert pools(2).run(cases.reduces, cases.ReducesMetrics, 48, True, 14, False) == [message] * 2


@pytest.mark.parametrize("kind", [cases.ReducesCount, cases.ReducesCountByAccelerator])
def test_loss_that_depends_on_other_ranks_is_refused(pools: Pools, kind: type):
    message = (
        f"the loss of {kind.__name__} (TokenModel) uses values of other ranks (torch.distributed, or gather or reduce "
        "of its accelerator), so micro-batches do not add up to the batch. Return the mean over the micro-batch of "
        "this rank, or use weights(trainer, items=...) to weight micro-batches only."
    )
    assert pools(2).run(cases.reduces, kind, 48, True, None, kind is cases.ReducesCount) == [message] * 2
