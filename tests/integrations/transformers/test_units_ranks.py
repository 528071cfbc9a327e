"""All ranks decide the same unit, whatever samples they hold, and raise together."""

import torch
from torch import nn

from bigbatch.errors import InputError, RankFailedError
from support import tiny_trainers as tiny
from support.accelerate_ranks import known_to_accelerate


def _finder(trainer):
    from bigbatch.integrations.transformers.units import UnitFinder

    def compute_loss(model, inputs, num_items_in_batch):
        return trainer.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)

    return UnitFinder(trainer, trainer.data_collator, compute_loss)


def _make(kind, samples):
    if kind == "mean":
        return tiny.trainer_of(tiny.gpt2(0.1), samples, cls=tiny.TokenMeanTrainer)
    if kind == "two terms":
        return tiny.trainer_of(tiny.qwen2_moe(), samples)
    return tiny.trainer_of(tiny.gpt2(0.1), samples)


def _units(kind, shares):
    """Return the units of windows; ``shares`` has the range of samples of each rank, for each window."""
    with known_to_accelerate():
        return _units_of(kind, shares)


def _units_of(kind, shares):
    rank = torch.distributed.get_rank()
    samples = tiny.token_samples()
    finder = _finder(_make(kind, samples))
    found = []
    for window in shares:
        try:
            unit = finder.unit(samples[slice(*window[rank])])
        except (InputError, RankFailedError) as error:
            return f"{type(error).__name__}: {error}"
        count = int(unit.count(tiny.collate_tokens(samples[:4]))) if unit.name != "undetermined" else None
        found.append((unit.name, unit.takes_num_items, count))
    return found


TOKENS = sum(len(sample["labels"]) - 1 for sample in tiny.token_samples()[:4])


def test_ranks_decide_the_same_unit(pools):
    found = pools(2).run(_units, "mean", [[(0, 9), (9, 16)], [(0, 9), (9, 16)]])
    assert found == [[("shifted labels", False, TOKENS)] * 2] * 2


def test_rank_without_samples_takes_part(pools):
    found = pools(2).run(_units, "mean", [[(0, 9), (0, 0)]])
    assert found == [[("shifted labels", False, TOKENS)]] * 2


def test_one_sample_on_each_rank_is_enough(pools):
    found = pools(2).run(_units, "mean", [[(0, 1), (1, 2)]])
    assert found == [[("shifted labels", False, TOKENS)]] * 2


def test_loss_times_ranks_is_no_other_unit(pools):
    # With num_items_in_batch the Trainer multiplies its loss by the number of ranks: the count is, too.
    found = pools(2).run(_units, "sum", [[(0, 9), (9, 16)]])
    assert found == [[("sum / num_items", True, 2 * TOKENS)]] * 2


def test_all_ranks_refuse_together(pools):
    first, second = pools(2).run(_units, "two terms", [[(0, 9), (0, 0)]])
    assert first == second
    assert "neither divided by num_items_in_batch nor independent of it" in first


def _collate_that_fails(_kind):
    samples = tiny.token_samples()
    trainer = tiny.trainer_of(tiny.gpt2(), samples)
    if torch.distributed.get_rank():
        trainer.data_collator = _broken
    try:
        _finder(trainer).unit(samples)
    except (KeyError, RankFailedError) as error:
        return f"{type(error).__name__}: {error}"


def _broken(samples):
    raise KeyError("labels")


def test_failure_of_one_rank_is_raised_on_all(pools):
    first, second = pools(2).run(_collate_that_fails, "")
    assert second == "KeyError: 'labels'"
    assert first.startswith("RankFailedError: rank 1 failed while the unit of the loss was determined: KeyError")


def _sharded(kind):
    from torch.distributed.fsdp import fully_shard

    samples = tiny.token_samples()
    trainer = _make(kind, samples)
    model = trainer.model
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    rank = torch.distributed.get_rank()
    unit = _finder(trainer).unit(samples[: 9 * (1 - rank)])
    return unit.name, [parameter.grad is None for parameter in model.parameters()].count(False)


def test_sharded_model_has_the_same_units(pools):
    assert pools(2).run(_sharded, "mean") == [("shifted labels", 0)] * 2
    assert pools(2).run(_sharded, "sum") == [("sum / num_items", 0)] * 2


def _wrapped(_kind):
    samples = tiny.token_samples()
    trainer = _make("mean", samples)
    trainer.model = nn.parallel.DistributedDataParallel(trainer.model)
    unit = _finder(trainer).unit(samples[:9])
    # The reducer of the wrapper is not armed: its next backward reduces as ever.
    inputs = tiny.collate_tokens(samples[torch.distributed.get_rank() :][:4])
    inputs.pop("labels")
    trainer.model(**inputs).logits.square().mean().backward()
    return unit.name, float(next(trainer.model.parameters()).grad.sum())


def test_wrapper_of_ddp_is_not_armed(pools):
    (name, first), (_, second) = pools(2).run(_wrapped, "")
    assert name == "shifted labels"
    assert first == second != 0
