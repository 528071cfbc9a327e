"""The unit of a loss is found by its gradients, and nothing else changes."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DataCollatorForLanguageModeling, Trainer

import bigbatch
from bigbatch.errors import InputError
from bigbatch.integrations.transformers.units import UnitFinder
from support import tiny_trainers as tiny

SUM = "sum / num_items"
WINDOW = 16


def finder_of(trainer):
    def compute_loss(model, inputs, num_items_in_batch):
        return trainer.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)

    return UnitFinder(trainer, trainer.data_collator, compute_loss)


def unit_of(trainer, samples):
    return finder_of(trainer).unit(samples[:WINDOW])


def masked_samples():
    return [{"input_ids": sample["input_ids"]} for sample in tiny.token_samples()]


def masking(seed=None):
    return DataCollatorForLanguageModeling(tiny.tokenizer(), mlm_probability=0.4, seed=seed)


def token_mean(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:])


def token_sum(outputs, labels, num_items_in_batch):
    loss = nn.functional.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum")
    return loss / num_items_in_batch.item()


CASES = {
    "GPT-2": (SUM, lambda: tiny.trainer_of(tiny.gpt2(), tiny.token_samples())),
    "GPT-2 with dropout": (SUM, lambda: tiny.trainer_of(tiny.gpt2(0.1), tiny.token_samples())),
    "GPT-2 in bfloat16": (SUM, lambda: tiny.trainer_of(tiny.gpt2().bfloat16(), tiny.token_samples())),
    "Llama": (SUM, lambda: tiny.trainer_of(tiny.llama(), tiny.token_samples())),
    "label smoothing": (SUM, lambda: tiny.trainer_of(tiny.gpt2(), tiny.token_samples(), label_smoothing_factor=0.1)),
    "Qwen2-MoE without its auxiliary loss": (
        SUM,
        lambda: tiny.trainer_of(tiny.qwen2_moe(aux_loss=False), tiny.token_samples()),
    ),
    "masked language model": (SUM, lambda: tiny.trainer_of(tiny.bert_masked_lm(0.1), masked_samples(), masking())),
    "overridden loss": (
        "shifted labels",
        lambda: tiny.trainer_of(tiny.gpt2(0.1), tiny.token_samples(), cls=tiny.TokenMeanTrainer),
    ),
    "overridden loss in bfloat16": (
        "shifted labels",
        lambda: tiny.trainer_of(tiny.llama().bfloat16(), tiny.token_samples(), cls=tiny.TokenMeanTrainer),
    ),
    "mean as loss function": (
        "shifted labels",
        lambda: tiny.trainer_of(tiny.gpt2(), tiny.token_samples(), compute_loss_func=token_mean),
    ),
    "BERT classifier": ("labels", lambda: tiny.trainer_of(tiny.bert_classifier(0.1), tiny.classification_samples())),
    "T5": ("labels", lambda: tiny.trainer_of(tiny.t5(), tiny.translation_samples())),
    "BART": ("labels", lambda: tiny.trainer_of(tiny.bart(), tiny.translation_samples())),
    "plain module": (
        "samples",
        lambda: tiny.trainer_of(tiny.Regression(0.1), tiny.regression_samples(), tiny.collate_regression),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_unit_of_usual_losses(name):
    expected, make = CASES[name]
    trainer = make()
    unit = unit_of(trainer, trainer.train_dataset)
    # The loss of a masked language model takes num_items_in_batch if its class passes it on.
    if name == "masked language model":
        assert unit.name in (SUM, "labels")
    else:
        assert unit.name == expected
    assert unit.takes_num_items == (unit.name == SUM)


def test_count_leaves_out_first_label_of_causal_model():
    samples = tiny.token_samples()
    unit = unit_of(tiny.trainer_of(tiny.gpt2(), samples), samples)
    assert int(unit.count(tiny.collate_tokens(samples))) == sum(len(sample["labels"]) - 1 for sample in samples)


def test_count_has_first_label_of_translation_model():
    samples = tiny.translation_samples()
    unit = unit_of(tiny.trainer_of(tiny.bart(), samples), samples)
    assert int(unit.count(tiny.collate_tokens(samples))) == sum(len(sample["labels"]) for sample in samples)


def test_sum_that_needs_a_number_counts_as_the_trainer():
    samples = tiny.token_samples()
    unit = unit_of(tiny.trainer_of(tiny.gpt2(), samples, compute_loss_func=token_sum), samples)
    # GPT2LMHeadModel has no loss type, so the Trainer counts all labels: those are the definition of this loss.
    assert (unit.name, unit.takes_num_items) == (SUM, True)


def test_finding_leaves_no_trace():
    samples = masked_samples()
    trainer = tiny.trainer_of(tiny.bert_masked_lm(0.1), samples, masking(seed=5))
    model, collate = trainer.model, trainer.data_collator
    collate([dict(sample) for sample in samples[:2]])  # makes its generator
    model.eval()
    model.bert.encoder.train()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    generator = collate.generator.get_state()
    unit_of(trainer, samples)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert torch.equal(collate.generator.get_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    gradients = [parameter.grad for parameter in model.parameters()]
    assert torch.equal(gradients[0], torch.ones_like(gradients[0]))
    assert all(gradient is None for gradient in gradients[1:])


def test_half_precision_is_probed_in_float32():
    samples = tiny.token_samples()
    seen = set()

    class Watched(tiny.TokenMeanTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.add(next(model.parameters()).dtype)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    trainer = tiny.trainer_of(tiny.gpt2().bfloat16(), samples, cls=Watched)
    parameters = list(trainer.model.parameters())
    addresses = [parameter.data_ptr() for parameter in parameters]
    assert unit_of(trainer, samples).name == "shifted labels"
    assert seen == {torch.float32}
    assert [parameter.data_ptr() for parameter in trainer.model.parameters()] == addresses
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}


def test_model_that_needs_half_precision_is_probed_in_it():
    samples = tiny.token_samples()

    class HalfOnly(tiny.TokenMeanTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if next(model.parameters()).dtype is not torch.bfloat16:
                raise RuntimeError("attention supports fp16 and bf16 only")
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    assert unit_of(tiny.trainer_of(tiny.gpt2().bfloat16(), samples, cls=HalfOnly), samples).name == "shifted labels"


def test_later_windows_run_no_model():
    samples = tiny.token_samples()
    trainer = tiny.trainer_of(tiny.gpt2(), samples)
    finder = finder_of(trainer)
    for _ in range(4):  # the next one is audited at window 8
        finder.unit(samples[:WINDOW])
    trainer.model.forward = None
    assert finder.unit(samples[WINDOW:]).name == SUM


def test_warnings_of_the_model_are_left_to_the_training():
    samples = tiny.token_samples()
    trainer = tiny.trainer_of(tiny.gpt2(), samples)
    trainer.model.register_forward_hook(lambda *_: warnings.warn("of every forward", FutureWarning, stacklevel=1))
    assert unit_of(trainer, samples).name == SUM  # every warning is an error in these tests


def test_autocast_of_accelerate_does_not_blur_units():
    samples = tiny.token_samples()
    trainer = tiny.trainer_of(tiny.gpt2().float(), samples, cls=tiny.TokenMeanTrainer, bf16=True)
    trainer.accelerator.prepare_model(trainer.model)
    forward = trainer.model.forward
    assert unit_of(trainer, samples).name == "shifted labels"
    assert trainer.model.forward == forward


# Units that the first window cannot tell from each other.


class AlignedMean(Trainer):
    """The mean over all labels, the first one of each row included."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return nn.functional.cross_entropy(outputs.logits.transpose(1, 2), inputs["labels"])


@pytest.mark.parametrize(("kind", "expected"), [(AlignedMean, "labels"), (tiny.TokenMeanTrainer, "shifted labels")])
def test_window_that_separates_units_is_probed(kind, expected):
    prompted, whole = tiny.token_samples(prompt=2), tiny.token_samples(seed=1)
    trainer = tiny.trainer_of(tiny.gpt2(), prompted, cls=kind)
    finder = finder_of(trainer)
    finder.unit(prompted[:WINDOW])
    assert finder.unit(whole[:WINDOW]).name == expected
    batch = tiny.collate_tokens(whole)
    labels = batch["labels"] if expected == "labels" else batch["labels"][:, 1:]
    assert int(finder.unit(whole[:WINDOW]).count(batch)) == int((labels != tiny.IGNORED).sum())


def test_sum_is_counted_right_when_windows_separate_units():
    prompted, whole = tiny.token_samples(prompt=2), tiny.token_samples(seed=1)
    finder = finder_of(tiny.trainer_of(tiny.llama(), prompted))
    finder.unit(prompted[:WINDOW])
    count = finder.unit(whole[:WINDOW]).count
    assert int(count(tiny.collate_tokens(whole))) == sum(len(sample["labels"]) - 1 for sample in whole)


def test_samples_of_one_length_separate_later():
    same, ragged = tiny.token_samples(low=6, high=6), tiny.token_samples()
    finder = finder_of(tiny.trainer_of(tiny.gpt2(), same, cls=tiny.TokenMeanTrainer))
    finder.unit(same[:WINDOW])
    assert finder.unit(ragged[:WINDOW]).name == "shifted labels"
    same_again = tiny.token_samples(low=9, high=9, seed=3)
    assert finder.unit(same_again[:WINDOW]).name == "shifted labels"


def test_classes_without_label_separate_later():
    samples = tiny.classification_samples()
    finder = finder_of(tiny.trainer_of(tiny.bert_classifier(), samples))
    finder.unit(samples[:WINDOW])
    unlabeled = [{**sample, "labels": tiny.IGNORED if i % 3 else 1} for i, sample in enumerate(samples)]
    unit = finder.unit(unlabeled[:WINDOW])
    assert unit.name == "labels"
    assert int(unit.count(tiny.collate_tokens(unlabeled))) == sum(s["labels"] != tiny.IGNORED for s in unlabeled)


# Windows that show nothing.


def test_window_of_one_sample_decides_later():
    samples = tiny.token_samples()
    finder = finder_of(tiny.trainer_of(tiny.gpt2(), samples, cls=tiny.TokenMeanTrainer))
    assert finder.unit(samples[:1]).name == "undetermined"
    assert finder.unit([]).name == "undetermined"
    assert finder.unit(samples[:WINDOW]).name == "shifted labels"


def test_one_sample_of_a_sum_is_counted():
    samples = tiny.token_samples()
    unit = finder_of(tiny.trainer_of(tiny.gpt2(), samples)).unit(samples[:1])
    assert (unit.name, int(unit.count(tiny.collate_tokens(samples[:1])))) == (SUM, len(samples[0]["labels"]) - 1)


def test_window_that_is_not_finite_decides_later():
    samples = tiny.regression_samples()
    broken = [{**sample, "labels": float("nan")} for sample in samples]
    finder = finder_of(tiny.trainer_of(tiny.Regression(), samples, tiny.collate_regression))
    assert finder.unit(broken).name == "undetermined"
    assert finder.unit(samples).name == "samples"


def test_one_sample_that_is_not_finite_is_avoided():
    samples = tiny.regression_samples()
    samples[0] = {**samples[0], "labels": float("nan")}
    assert unit_of(tiny.trainer_of(tiny.Regression(), samples, tiny.collate_regression), samples).name == "samples"


def test_samples_without_labels_are_avoided():
    samples = tiny.translation_samples()
    for sample in samples[:9]:
        sample["labels"] = [tiny.IGNORED] * len(sample["labels"])
    assert unit_of(tiny.trainer_of(tiny.t5(), samples), samples).name == "labels"


# Losses that are refused.


class Changed(Trainer):
    """Changes the loss of a regression; subclasses say how."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        prediction = model.layers(inputs["x"]).squeeze(-1)
        return self.loss(model, prediction, inputs["labels"])


class Contrastive(Changed):
    def loss(self, model, prediction, labels):
        return nn.functional.cross_entropy(prediction[:, None] * labels, torch.arange(len(labels)))


class WithPenalty(Changed):
    def loss(self, model, prediction, labels):
        return nn.functional.mse_loss(prediction, labels) + 0.1 * prediction.mean() ** 2


class RandomInEval(Changed):
    def loss(self, model, prediction, labels):
        return nn.functional.mse_loss(prediction + torch.randn_like(prediction), labels)


class Sum(Changed):
    def loss(self, model, prediction, labels):
        return nn.functional.mse_loss(prediction, labels, reduction="sum")


class Constant(Changed):
    def loss(self, model, prediction, labels):
        return nn.functional.mse_loss(prediction * 0, labels)


class WithReference(Changed):
    """Adds a term that is 0 while the model equals its reference."""

    def loss(self, model, prediction, labels):
        if not hasattr(self, "ref_model"):
            self.ref_model = copy.deepcopy(model)
        difference = prediction - self.ref_model.layers(self.inputs).squeeze(-1).detach()
        return nn.functional.mse_loss(prediction, labels) + difference.mean() ** 2

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.inputs = inputs["x"]
        return super().compute_loss(model, inputs)


def test_term_that_is_hidden_at_the_start_is_refused():
    samples = tiny.regression_samples()
    trainer = tiny.trainer_of(tiny.Regression(), samples, tiny.collate_regression, cls=WithReference)
    trainer.ref_model = copy.deepcopy(trainer.model)
    finder = finder_of(trainer)
    assert finder.unit(samples).name == "samples"
    with torch.no_grad():
        trainer.model.layers[0].weight.mul_(1.05)
    with pytest.raises(InputError, match="is a mean over none of the known units"):
        finder.unit(samples)


class TwoUnits(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        tokens = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), inputs["labels"][:, 1:])
        return tokens + logits[:, 0].logsumexp(-1).mean()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Contrastive, "samples influence one another, the loss has several terms"),
        (WithPenalty, "samples influence one another, the loss has several terms"),
        (Sum, "is a mean over none of the known units"),
        (RandomInEval, "draws random numbers in eval mode too"),
        (Constant, "has a gradient of 0 for the samples of this window that were tried"),
    ],
)
def test_losses_without_unit_are_refused(kind, sentence):
    samples = tiny.regression_samples()
    with pytest.raises(InputError, match=sentence) as caught:
        unit_of(tiny.trainer_of(tiny.Regression(), samples, tiny.collate_regression, cls=kind), samples)
    assert "items=callable(inputs) -> number" in str(caught.value)


def test_terms_in_two_units_are_refused():
    samples = tiny.token_samples()
    with pytest.raises(InputError, match=r"shifted labels .*samples .*several terms in different units"):
        unit_of(tiny.trainer_of(tiny.gpt2(), samples, cls=TwoUnits), samples)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_auxiliary_loss_is_refused(bfloat16):
    samples = tiny.token_samples()
    model = tiny.qwen2_moe()
    with pytest.raises(InputError, match="neither divided by num_items_in_batch nor independent of it"):
        unit_of(tiny.trainer_of(model.bfloat16() if bfloat16 else model, samples), samples)


class AuxiliaryInTraining(Trainer):
    """Adds a term in training mode only, in which dropout is active."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss + 0.01 * model.lm_head.weight.square().sum() if model.training else loss


def test_term_in_training_mode_only_is_refused():
    samples = tiny.token_samples()
    with pytest.raises(InputError, match="it has several terms"):
        unit_of(tiny.trainer_of(tiny.gpt2(0.1), samples, cls=AuxiliaryInTraining), samples)


def test_error_of_the_loss_is_raised_as_it_is():
    class Broken(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            raise KeyError("no such column")

    samples = tiny.token_samples()
    with pytest.raises(KeyError, match="no such column"):
        unit_of(tiny.trainer_of(tiny.gpt2(), samples, cls=Broken), samples)


def test_out_of_memory_retries_with_two_samples():
    sizes: list[int] = []

    class Large(tiny.TokenMeanTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            sizes.append(len(inputs["labels"]))
            if len(inputs["labels"]) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    samples = tiny.token_samples()
    assert unit_of(tiny.trainer_of(tiny.gpt2(), samples, cls=Large), samples).name == "shifted labels"
    assert max(sizes[: sizes.index(2)]) == 3


def test_out_of_memory_with_two_samples_is_refused():
    class TooLarge(tiny.TokenMeanTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            raise torch.OutOfMemoryError("out of memory")

    samples = tiny.token_samples()
    with pytest.raises(InputError, match=r"memory is insufficient to determine the unit .* from two samples together"):
        unit_of(tiny.trainer_of(tiny.gpt2(), samples, cls=TooLarge), samples)


def test_input_error_is_public():
    assert issubclass(InputError, ValueError)
    assert bigbatch.__all__
