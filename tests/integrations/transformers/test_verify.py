"""`verify` shows what the stock Trainer does, what `exact` does, and changes nothing."""

import copy

import datasets
import pytest
import torch
from transformers import DataCollatorForLanguageModeling, TrainerCallback

from bigbatch.errors import InputError
from bigbatch.integrations.transformers import exact, verify, weights
from integrations.transformers import trainer_cases as cases
from support import tiny_trainers as tiny
from support.accelerate_ranks import known_to_accelerate
from support.tiers import slow, slow_except

EXACT = 1e-12
WRONG = 0.1


def token_mean(**settings):
    return tiny.trainer_of(tiny.gpt2(0.1), tiny.token_samples(), cls=tiny.TokenMeanTrainer, **settings)


def count_shifted(inputs):
    return (inputs["labels"][:, 1:] != tiny.IGNORED).sum()


CASES = {
    "overridden loss": ("shifted labels", token_mean),
    "BERT classifier": ("labels", lambda: tiny.trainer_of(tiny.bert_classifier(), tiny.classification_samples())),
    "T5": ("labels", lambda: tiny.trainer_of(tiny.t5(), tiny.translation_samples())),
    "BART": ("labels", lambda: tiny.trainer_of(tiny.bart(), tiny.translation_samples())),
}


@pytest.mark.parametrize("name", slow_except(CASES, "overridden loss", "BERT classifier"))
def test_wrong_trainers_are_shown(name):
    expected, make = CASES[name]
    result = verify(make())
    assert result.unit == expected
    assert result.stock_error >= WRONG
    assert result.exact
    assert result.relative_error <= EXACT
    assert [each.name for each in result.windows] == ["first", "last"]
    assert [each.num_samples for each in result.windows] == [16, 6]
    assert max(each.relative_error for each in result.windows) <= EXACT


def test_right_trainer_is_right_in_both():
    result = verify(tiny.trainer_of(tiny.llama(), tiny.token_samples()))
    assert max(result.stock_error, result.relative_error) <= 1e-6
    assert result.unit == "sum / num_items"
    verdict = f"bigbatch: exact (tolerance {result.tolerance:.0e}); stock Trainer: exact on these samples"
    assert str(result).endswith(verdict)


def test_only_last_window_may_be_wrong():
    result = verify(tiny.trainer_of(tiny.Regression(), tiny.regression_samples(), tiny.collate_regression))
    first, last = result.windows
    assert first.stock_error <= EXACT
    assert last.stock_error >= WRONG
    assert max(first.relative_error, last.relative_error) <= EXACT


def test_random_collator_draws_one_mask():
    samples = [{"input_ids": sample["input_ids"]} for sample in tiny.token_samples()]
    collator = DataCollatorForLanguageModeling(tiny.tokenizer(), mlm_probability=0.4)
    result = verify(tiny.trainer_of(tiny.bert_masked_lm(), samples, collator))
    assert result.exact
    assert result.relative_error <= EXACT
    assert result.stock_error >= WRONG


def test_result_prints_as_table():
    result = verify(token_mean())
    header, columns, first, last, unit, verdict = str(result).split("\n")
    assert header == (
        "gradient of TokenMeanTrainer (GPT2LMHeadModel), relative error against the whole batch in one piece"
    )
    assert columns.split() == ["window", "samples", "micro-batches", "stock", "Trainer", "bigbatch"]
    assert first.split()[:3] == ["first", "16", "4"]
    assert last.split()[:3] == ["last", "6", "2"]
    assert unit == "the loss is averaged over: shifted labels"
    assert verdict == "bigbatch: exact (tolerance 2e-05); stock Trainer: NOT exact"


def test_exact_trainer_is_verified_with_its_settings():
    trainer = exact(token_mean(), microbatch=3, items=count_shifted)
    kind = type(trainer)
    result = verify(trainer)
    assert result.unit == "items= that was passed"
    assert result.stock_error >= WRONG
    assert result.relative_error <= EXACT
    assert type(trainer) is kind
    assert trainer.bigbatch_report is None


def test_wrong_items_are_not_exact():
    result = verify(exact(token_mean(), items=lambda inputs: inputs["labels"].shape[0]))
    assert not result.exact
    assert result.relative_error >= 0.01
    assert str(result).endswith("bigbatch: NOT exact (tolerance 2e-05); stock Trainer: NOT exact")


def test_weighted_trainer_is_verified_in_its_loop():
    result = verify(weights(token_mean(), items=count_shifted))
    assert result.stock_error >= WRONG
    assert result.relative_error <= EXACT
    result = verify(weights(token_mean(), items=lambda inputs: 1))
    assert not result.exact


def test_one_sample_at_a_time_if_memory_is_short():
    class Small(tiny.TokenMeanTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if len(inputs["labels"]) > 4:
                raise torch.OutOfMemoryError("out of memory")
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    result = verify(tiny.trainer_of(tiny.gpt2(), tiny.token_samples(), cls=Small))
    assert result.reference == "one sample at a time, weighted by its items"
    assert result.relative_error <= EXACT


def test_loader_that_collates_is_verified_by_its_batches():
    class Own(tiny.TokenMeanTrainer):
        def get_train_dataloader(self):
            rows = self.train_dataset
            return [tiny.collate_tokens(rows[start : start + 4]) for start in range(0, len(rows), 4)]

    result = verify(tiny.trainer_of(tiny.gpt2(), tiny.token_samples(), cls=Own))
    assert result.reference == "the loader's batches, weighted by their items"
    assert result.relative_error <= EXACT
    assert result.stock_error >= WRONG


class VerifyInTraining(TrainerCallback):
    """Verifies the trainer after its first update."""

    def __init__(self):
        self.trainer, self.result = None, None

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 1:
            self.result = verify(self.trainer)


@pytest.mark.parametrize("is_exact", [False, slow(True)])
def test_verify_changes_nothing_in_training(is_exact):
    outcomes = []
    for verifies in (False, True):
        torch.manual_seed(3)
        trainer, callback = token_mean(learning_rate=0.01), VerifyInTraining()
        callback.trainer = trainer
        if is_exact:
            exact(trainer)
        if verifies:
            verify(trainer)
            trainer.add_callback(callback)
        trainer.train()
        outcomes.append((copy.deepcopy(trainer.model.state_dict()), trainer.state.global_step, torch.get_rng_state()))
    assert callback.result.exact
    (before, steps, states), (after, steps_after, states_after) = outcomes
    assert steps == steps_after == 6
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(states, states_after)


def test_refused_losses_raise_here_too():
    with pytest.raises(InputError, match="auxiliary loss of the routers"):
        verify(tiny.trainer_of(tiny.qwen2_moe(), tiny.token_samples()))
    with pytest.raises(InputError, match=r"trainer is a Linear: pass a transformers\.Trainer"):
        verify(torch.nn.Linear(1, 1))


def _verified_on_ranks(is_exact):
    with known_to_accelerate():
        trainer = token_mean()
        if is_exact:
            exact(trainer)
        result = verify(trainer)
        return result.unit, result.stock_error, result.relative_error, [each.num_samples for each in result.windows]


@pytest.mark.parametrize("is_exact", [False, True])
def test_ranks_are_verified_together(pools, is_exact):
    (unit, stock_error, error, sizes), second = pools(2).run(_verified_on_ranks, is_exact)
    assert (unit, stock_error, error) == second[:3]
    assert unit == "shifted labels"
    assert stock_error >= WRONG
    assert error <= EXACT
    assert sum(sizes) == 12


def test_case_of_other_tests_is_verified(tmp_path):
    trainer, _ = cases.make(tmp_path)
    result = verify(exact(trainer, items=cases.num_labels, microbatch=5))
    assert result.relative_error <= EXACT
    assert result.stock_error >= 0.05


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def test_streams_and_unused_columns_are_read():
    samples = [{**sample, "source": "a book"} for sample in tiny.token_samples()]
    for dataset in (samples, Stream(samples), datasets.Dataset.from_list(samples)):
        trainer = tiny.trainer_of(
            tiny.gpt2(), dataset, tiny.collate_tokens, tiny.TokenMeanTrainer, remove_unused_columns=True, max_steps=2
        )
        result = verify(trainer)
        assert result.relative_error <= EXACT
        assert result.stock_error >= WRONG
        assert len(trainer.accelerator._dataloaders) == 0


def _sharded(_):
    from torch.distributed.fsdp import fully_shard

    with known_to_accelerate():
        trainer = token_mean()
        for block in trainer.model.transformer.h:
            fully_shard(block)
        fully_shard(trainer.model)
        result = verify(trainer)
        return result.unit, result.stock_error, result.relative_error


def test_sharded_model_is_verified(pools):
    first, second = pools(2).run(_sharded, "")
    assert first == second
    unit, stock_error, error = first
    assert unit == "shifted labels"
    assert stock_error >= WRONG
    assert error <= EXACT


class Normed(tiny.Regression):
    """Normalizes by the statistics of a micro-batch, unless it is frozen."""

    def __init__(self, frozen):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(5).double()
        self.frozen = frozen

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.norm.eval()
        return self

    def forward(self, x, labels=None):
        return super().forward(self.norm(x), labels)


@pytest.mark.parametrize("frozen", [False, True])
def test_training_batch_norms_are_named(frozen):
    result = verify(tiny.trainer_of(Normed(frozen).eval(), tiny.regression_samples(), tiny.collate_regression))
    assert result.relative_error <= EXACT
    assert result.exact is frozen
    if frozen:
        assert result.causes == ()
    else:
        assert str(result).endswith(
            "bigbatch: NOT exact (tolerance 2e-05); stock Trainer: NOT exact\n"
            "  cause: BatchNorm in training mode (norm) normalizes by the mean and "
            "variance of a micro-batch, so the updates are not exactly those of the whole batch: set it to eval mode, "
            "or use GroupNorm or LayerNorm."
        )
