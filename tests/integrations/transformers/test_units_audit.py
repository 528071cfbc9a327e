"""Losses whose unit fits a few samples of the first window, but not all, are refused."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bigbatch
from bigbatch.integrations.transformers import exact
from integrations.transformers import trainer_cases as cases
from support import full_batch_reference as ref

RARE = 7


class OwnLoss(cases.MeanLoss):
    """Has a mean loss of logits ``[samples, length, labels]`` and labels ``[samples, length]``."""

    def mean(self, logits, labels):
        raise NotImplementedError

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.mean(model(inputs["tokens"]), inputs["labels"])


class WeightsClasses(OwnLoss):
    def mean(self, logits, labels):
        weight = torch.ones(ref.VOCABULARY, dtype=logits.dtype)
        weight[RARE] = 20
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight, ignore_index=ref.IGNORED)


class IgnoresALabel(OwnLoss):
    def mean(self, logits, labels):
        labels = labels.masked_fill(labels == RARE, ref.IGNORED)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ref.IGNORED)


class MeansOfLabelledSamples(OwnLoss):
    def mean(self, logits, labels):
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=ref.IGNORED, reduction="none")
        counts = (labels != ref.IGNORED).sum(1)
        return (losses.sum(1) / counts.clamp(min=1)).sum() / (counts > 0).sum()


class StartsATerm(OwnLoss):
    def mean(self, logits, labels):
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ref.IGNORED)
        return loss + logits.square().mean((1, 2)).mean() if self.state.global_step else loss


def _samples() -> cases.Samples:
    """Return samples of which only long ones have the rare label, or no label."""
    rows = cases.samples(36)
    for number, row in enumerate(rows):
        tokens = torch.randint(ref.VOCABULARY, (2 + number % 5,), generator=torch.Generator().manual_seed(number))
        labels = torch.where(tokens == RARE, 0, tokens)
        if number % 5 == 4:
            labels[:2] = RARE
        if number % 10 == 9:
            labels[:] = ref.IGNORED
        row.update(tokens=tokens, labels=labels)
    return rows


@pytest.mark.parametrize("kind", [WeightsClasses, IgnoresALabel, MeansOfLabelledSamples, StartsATerm])
def test_unit_that_does_not_fit_all_samples_is_refused(tmp_path: Path, kind):
    trainer, recorder = cases.make(tmp_path, kind, dataset=_samples())
    with pytest.raises(bigbatch.InputError, match=f"the loss of {kind.__name__} .TokenModel. is a mean over"):
        exact(trainer).train()
    assert len(recorder.gradients) == (kind is StartsATerm)  # the others change no weight


def test_sentence_names_the_reasons(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, IgnoresALabel, dataset=_samples())
    with pytest.raises(bigbatch.InputError) as caught:
        exact(trainer).train()
    before, _, after = str(caught.value).partition(" for all samples of this window (relative error")
    assert before == "the loss of IgnoresALabel (TokenModel) is a mean over none of the known units"
    assert after.partition("): ")[2] == (
        "it has class weights or several terms, leaves out labels, depends on padding, or samples influence one "
        "another. Pass items=callable(inputs) -> number to exact() if you know what it is averaged over, or use "
        "weights(trainer, items=...) to weight micro-batches only."
    )


def test_mean_over_ragged_padding_is_refused(tmp_path: Path):
    class OverPositions(OwnLoss):
        def mean(self, logits, labels):
            return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=ref.IGNORED, reduction="none").mean()

    trainer, _ = cases.make(tmp_path, OverPositions)
    with pytest.raises(bigbatch.InputError) as caught:
        exact(trainer).train()
    assert str(caught.value) == (
        "the loss of OverPositions (TokenModel) is a mean over positions, padding included, so it depends on which "
        "samples are padded together: pad all samples to one length in the data collator, or average over labels."
    )


def test_division_by_steps_is_refused(tmp_path: Path):
    class Divides(OwnLoss):
        def mean(self, logits, labels):
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ref.IGNORED)
            return loss / self.args.gradient_accumulation_steps

    trainer, _ = cases.make(tmp_path, Divides)
    with pytest.raises(bigbatch.InputError) as caught:
        exact(trainer).train()
    assert str(caught.value) == (
        "the loss of Divides (TokenModel) depends on args.gradient_accumulation_steps, and exact() divides by the "
        "items of the whole window: return the mean of the micro-batch undivided."
    )


def test_loss_of_one_element_is_accepted(tmp_path: Path):
    class OneElement(OwnLoss):
        def mean(self, logits, labels):
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ref.IGNORED)[None]

    trainer, recorder = cases.make(tmp_path, OneElement)
    exact(trainer).train()
    assert max(cases.errors(recorder, ref.make_model(), cases.windows(trainer.train_dataset))) <= 1e-12
    assert trainer.bigbatch_report.step == 3


def test_loss_of_several_elements_is_refused(tmp_path: Path):
    class Several(OwnLoss):
        def mean(self, logits, labels):
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ref.IGNORED).repeat(2)

    trainer, _ = cases.make(tmp_path, Several)
    with pytest.raises(bigbatch.InputError) as caught:
        exact(trainer, items=cases.num_labels).train()
    assert str(caught.value) == "compute_loss of Several returned a loss of shape (2,): return its mean."


def test_loss_that_requires_a_number_of_items_is_given_those_passed(tmp_path: Path):
    class OverNumber(cases.MeanLoss):
        def get_batch_samples(self, *args, **kwargs):
            return super().get_batch_samples(*args, **kwargs)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return ref.loss_and_items(model, inputs)[0] / num_items_in_batch

    trainer, recorder = cases.make(tmp_path, OverNumber)
    exact(trainer, items=cases.num_labels).train()
    assert max(cases.errors(recorder, ref.make_model(), cases.windows(trainer.train_dataset))) <= 1e-12


@pytest.mark.parametrize("number", [-1, None])
def test_items_that_are_no_count_are_refused(tmp_path: Path, number):
    trainer, _ = cases.make(tmp_path)
    with pytest.raises(bigbatch.InputError) as caught:
        exact(trainer, items=lambda inputs: number).train()
    assert str(caught.value) == (
        f"items= returned {number}: it must return the number of items of a micro-batch, 0 or more."
    )


def test_too_few_lengths_are_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path)
    with pytest.raises(bigbatch.InputError) as caught:
        exact(trainer, microbatch=bigbatch.TokenBudget(24), lengths=lambda rows: [6] * (len(rows) - 1)).train()
    assert str(caught.value) == (
        "lengths= returned 11 lengths for a batch of 12 samples: it must return one for each, in their order."
    )


def test_labels_that_prepare_inputs_changes_are_refused(tmp_path: Path):
    class Masks(cases.MeanLoss):
        def _prepare_inputs(self, inputs):
            inputs = super()._prepare_inputs(inputs)
            inputs["labels"][:, 0] = ref.IGNORED
            return inputs

    trainer, _ = cases.make(tmp_path, Masks)
    with pytest.raises(bigbatch.InputError) as caught:
        exact(trainer, items=cases.num_labels).train()
    assert str(caught.value) == (
        "_prepare_inputs of Masks changes the number of items of a micro-batch from 8 to 4, and they are counted "
        "before it: change labels and masks in the data collator."
    )


@pytest.mark.parametrize("read", [lambda inputs: inputs["tokens"], lambda inputs: inputs.get("tokens")])
def test_training_step_that_reads_inputs_is_refused(tmp_path: Path, read):
    class Reads(cases.MeanLoss):
        def training_step(self, model, inputs, *args):
            read(inputs)
            return super().training_step(model, inputs, *args)

    trainer, _ = cases.make(tmp_path, Reads)
    with pytest.raises(bigbatch.InputError) as caught:
        exact(trainer).train()
    assert str(caught.value) == (
        "'tokens' was read from a batch of a trainer that exact() was called on, whose samples are collated in "
        "micro-batches later: read or change inputs in compute_loss or in the data collator."
    )


def test_steps_that_change_within_an_epoch_are_refused(tmp_path: Path):
    class Changes(cases.Recorder):
        def on_step_end(self, args, state, control, **_):
            args.gradient_accumulation_steps = 2

    trainer, _ = cases.make(tmp_path, dataset=cases.samples(48), callbacks=[Changes()])
    with pytest.raises(bigbatch.InputError) as caught:
        exact(trainer).train()
    assert str(caught.value) == (
        "gradient_accumulation_steps was changed to 2 within an epoch, so an update would come before the last batch "
        "of its window: change it between calls of train()."
    )


def test_probe_logs_nothing(tmp_path: Path):
    class Logs(OwnLoss):
        def mean(self, logits, labels):
            self.log({"in_loss": 1.0})
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ref.IGNORED)

    class Counts(cases.Recorder):
        num_logs = 0

        def on_log(self, args, state, control, logs=None, **_):
            self.num_logs += "in_loss" in logs

    counts = Counts()
    trainer, _ = cases.make(tmp_path, Logs, callbacks=[counts])
    exact(trainer).train()
    assert counts.num_logs == 8  # micro-batches


def test_loss_in_bfloat16_of_a_float32_model_is_accepted(tmp_path: Path):
    class Rounded(OwnLoss):
        def mean(self, logits, labels):
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ref.IGNORED)
            return loss.to(torch.bfloat16)

    trainer, recorder = cases.make(tmp_path, Rounded, ref.make_model().float())
    exact(trainer).train()
    errors = cases.errors(recorder, ref.make_model().float(), cases.windows(trainer.train_dataset))
    assert max(errors) <= 1e-2  # the gradient of bfloat16 that enters the loss is rounded
