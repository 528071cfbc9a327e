"""Updates of a SentenceTransformerTrainer on two ranks are those of a stock trainer on whole batches."""

import pytest

pytest.importorskip("sentence_transformers", minversion="6.0", reason="sentence-transformers is not installed")

from integrations.sentence_transformers import ranks_cases as cases
from support.process_pool import Pools
from support.tiers import slow, slow_except

EXACT = 1e-12
TIMEOUT_S = 90.0  # the first function imports the frameworks


@pytest.mark.parametrize("name", slow_except(cases.LOSSES, "mnrl"))
def test_update_is_that_of_whole_batches(pools: Pools, name: str):
    for errors, both in pools(2).run(cases.compared, name, timeout_s=TIMEOUT_S):
        assert len(errors) == 2
        assert max(errors) <= (cases.cases.EXACT_WHERE_CACHED if name == "cached" else EXACT)
        assert both == [3, 3]


@pytest.mark.parametrize(
    ("microbatch", "memory", "most"), [slow(None, "8GiB", 99), (7, None, 3)], ids=["memory", "out of memory"]
)
@pytest.mark.parametrize("name", [slow("mnrl"), "gathered"])
def test_micro_batches_of_ranks_may_differ(
    pools: Pools, name: str, microbatch: int | None, memory: str | None, most: int
):
    for errors, both in pools(2).run(cases.compared, name, microbatch, memory, most, timeout_s=TIMEOUT_S):
        assert max(errors) <= EXACT
        assert memory is not None or both[0] > both[1]


def test_parameters_of_loss_are_summed_over_ranks(pools: Pools):
    for errors, difference in pools(2).run(cases.own_parameters, timeout_s=TIMEOUT_S):
        assert len(errors) == 2
        assert max(errors) <= EXACT
        assert difference == 0


def test_ranks_have_batches_of_different_datasets(pools: Pools):
    for errors in pools(2).run(cases.several_datasets, timeout_s=TIMEOUT_S):
        assert len(errors) == 4
        assert max(errors) <= EXACT


@pytest.mark.parametrize("name", ["mnrl", slow("cached")])
def test_sharded_model_has_whole_batch_gradient(pools: Pools, name: str):
    for errors in pools(2).run(cases.sharded, name, timeout_s=TIMEOUT_S):
        assert max(errors) <= (cases.cases.EXACT_WHERE_CACHED if name == "cached" else EXACT)


def test_what_several_ranks_cannot_do_is_refused(pools: Pools):
    for datasets, drawn, guided, own, split, last in pools(2).run(cases.refusals, timeout_s=TIMEOUT_S):
        assert datasets == (
            "MultipleNegativesRankingLoss has gather_across_devices=True, and ranks may have batches of different "
            "datasets, with different losses, at the same time: use one loss for all datasets, or "
            "gather_across_devices=False."
        )
        assert drawn == (
            "MatryoshkaLoss with n_dims_per_step=1 draws other dimensions on each rank, and gather_across_devices=True "
            "makes one loss for all of them: set n_dims_per_step=-1."
        )
        assert guided == (
            "CachedGISTEmbedLoss with gather_across_devices=True and contrast_anchors=True compares anchors with those "
            "of their own rank only, and candidates with those of all ranks: set contrast_anchors=False."
        )
        assert own == (
            "_OwnGather calls torch.distributed, and ranks may compute it at different times: use "
            "gather_across_devices=True of MultipleNegativesRankingLoss or GISTEmbedLoss."
        )
        assert split == (
            '"split_batches": True in accelerator_config divides each batch of 24 samples among 2 ranks: set it to '
            "False, and per_device_train_batch_size to the samples of one rank."
        )
        assert last == (
            "dataloader_drop_last is False, so some of 2 ranks may have a smaller last batch, or none, and the others "
            "would wait for them: set it to True."
        )
