"""Every update of a Trainer has the gradient of its whole batch."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer

import bigbatch
from bigbatch.integrations.transformers import ExactTrainer, exact, weights
from integrations.transformers import trainer_cases as cases
from support import full_batch_reference as ref

EXACT = 1e-12
WRONG = 0.05


def mean_over_labels(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), ignore_index=ref.IGNORED)


class WithLogits(nn.Module):
    """Returns a dict, as ``compute_loss_func`` expects."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ref.make_model()

    def forward(self, tokens):
        return {"logits": self.inner(tokens)}


def run(trainer, recorder, **settings):
    exact(trainer, **{"items": cases.num_labels, **settings}).train()
    return cases.errors(recorder, ref.make_model(), cases.windows(trainer.train_dataset))


def test_stock_trainer_is_wrong_on_this_data(tmp_path: Path):
    trainer, recorder = cases.make(tmp_path)
    trainer.train()
    assert min(cases.errors(recorder, ref.make_model(), cases.windows(trainer.train_dataset))) >= WRONG


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"microbatch": 1},
        {"microbatch": 5},
        {"microbatch": 100},
        {"microbatch": bigbatch.TokenBudget(14), "lengths": lambda rows: [len(row["tokens"]) for row in rows]},
    ],
)
def test_each_window_has_whole_batch_gradient(tmp_path: Path, settings):
    errors = run(*cases.make(tmp_path), **settings)
    assert len(errors) == 3
    assert max(errors) <= EXACT


def test_items_that_do_not_fit_are_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path)
    exact(trainer, items=lambda inputs: len(inputs["tokens"]))
    with pytest.raises(bigbatch.InputError, match=r"^items= does not count") as refused:
        trainer.train()
    assert re.sub(r"error \S+\)", "error X)", str(refused.value)) == (
        "items= does not count what the loss of MeanLoss (TokenModel) is averaged over: with these counts the loss of "
        "a micro-batch is not the mean of its two halves (relative error X). Return the number that the loss is "
        "divided by, for class weights weight[labels].sum(), and a mean from the loss. A loss with several terms, or "
        "in which samples influence one another, has no such number: use weights(trainer, items=...) to weight "
        "micro-batches only."
    )


def test_loss_function_that_returns_mean_is_exact(tmp_path: Path):
    recorder = cases.Recorder()
    trainer = Trainer(
        WithLogits(),
        cases.arguments(tmp_path),
        data_collator=cases.collate,
        train_dataset=cases.samples(),
        compute_loss_func=mean_over_labels,
        callbacks=[recorder],
    )
    exact(trainer, items=cases.num_labels).train()
    errors = cases.errors(
        recorder,
        WithLogits(),
        cases.windows(cases.samples()),
        lambda model, batch: mean_over_labels(model(batch["tokens"]), batch["labels"]),
    )
    assert max(errors) <= EXACT


def test_mixin_is_exact(tmp_path: Path):
    class Mine(ExactTrainer, Trainer):
        exact_settings = {"items": cases.num_labels, "microbatch": 3}  # noqa: RUF012

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            return F.cross_entropy(model(**inputs).flatten(0, 1), labels.flatten(), ignore_index=ref.IGNORED)

    trainer, recorder = cases.make(tmp_path, Mine)
    trainer.train()
    assert max(cases.errors(recorder, ref.make_model(), cases.windows(trainer.train_dataset))) <= EXACT
    assert trainer.bigbatch_report.num_microbatches == 3  # 7 samples in cuts of 3


def test_loss_assigned_to_instance_is_used(tmp_path: Path):
    trainer, recorder = cases.make(tmp_path, Trainer)
    own = trainer.compute_loss = lambda model, inputs, **_: ref.loss_mean(model, inputs)
    assert max(run(trainer, recorder)) <= EXACT
    assert vars(trainer)["compute_loss"] is own


def test_clipping_and_adam_are_those_of_the_trainer(tmp_path: Path):
    settings = {"max_grad_norm": 0.1, "optim": "adamw_torch", "weight_decay": 0.1}
    weights = []
    for steps in (1, cases.STEPS):  # whole batches in one piece by the stock Trainer, in three by ours
        trainer, _ = cases.make(
            tmp_path,
            per_device_train_batch_size=cases.BATCH * cases.STEPS // steps,
            gradient_accumulation_steps=steps,
            **settings,
        )
        if steps > 1:
            exact(trainer, items=cases.num_labels)
        trainer.train()
        weights.append(ref.parameters_of(trainer.model))
    assert ref.relative_error(weights[1], weights[0]) <= EXACT


def test_report_has_counts_of_last_window(tmp_path: Path):
    trainer, _ = cases.make(tmp_path)
    assert exact(trainer, items=cases.num_labels).bigbatch_report is None
    trainer.train()
    report = trainer.bigbatch_report
    last = cases.windows(trainer.train_dataset)[-1]
    assert (report.items, report.num_microbatches) == (cases.num_labels(last), 2)


def test_batches_of_own_loader_are_micro_batches(tmp_path: Path):
    class OwnLoader(cases.MeanLoss):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, 5, collate_fn=cases.collate)

    trainer, recorder = cases.make(tmp_path, OwnLoader, dataset=cases.samples(33))
    exact(trainer, items=cases.num_labels).train()
    parts = cases.windows(trainer.train_dataset, size=5 * cases.STEPS)
    assert max(cases.errors(recorder, ref.make_model(), parts)) <= EXACT


def test_own_loader_with_microbatch_is_refused(tmp_path: Path):
    class OwnLoader(cases.MeanLoss):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, 5, collate_fn=cases.collate)

    trainer, _ = cases.make(tmp_path, OwnLoader)
    with pytest.raises(bigbatch.InputError) as caught:
        exact(trainer, items=cases.num_labels, microbatch=2).train()
    assert str(caught.value) == (
        "the train dataloader of OwnLoader yields batches that are collated already, so micro-batches cannot be "
        "chosen: leave microbatch= and memory= out, and its batches are the micro-batches; or collate with "
        "self.data_collator in get_train_dataloader."
    )


def test_own_division_by_steps_is_refused(tmp_path: Path):
    class Divides(cases.MeanLoss):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs)) / self.args.gradient_accumulation_steps
            self.accelerator.backward(loss)
            return loss.detach()

    trainer, _ = cases.make(tmp_path, Divides)
    with pytest.raises(bigbatch.InputError) as caught:
        exact(trainer, items=cases.num_labels).train()
    assert str(caught.value) == (
        "training_step of Divides multiplies the loss by 0.333333, and the loss of a window is complete: remove "
        "the division by the number of accumulation steps."
    )


class Stream(torch.utils.data.IterableDataset):
    """Samples without a length."""

    def __iter__(self):
        return iter(cases.samples())


def test_stream_is_exact(tmp_path: Path):
    trainer, recorder = cases.make(tmp_path, dataset=Stream(), max_steps=2)
    exact(trainer, items=cases.num_labels).train()
    parts = cases.windows(cases.samples())[:2]
    assert max(cases.errors(recorder, ref.make_model(), parts)) <= EXACT


def test_samples_after_last_update_of_stream_count_in_next(tmp_path: Path):
    trainer, recorder = cases.make(tmp_path, dataset=Stream(), max_steps=3)
    exact(trainer, items=cases.num_labels).train()
    rows, size = cases.samples(), cases.BATCH * cases.STEPS
    parts = [*cases.windows(rows)[:2], cases.collate([*rows[2 * size :], *rows[:size]])]  # the Trainer starts again
    assert max(cases.errors(recorder, ref.make_model(), parts)) <= EXACT


def test_samples_from_workers_are_exact(tmp_path: Path):
    trainer, recorder = cases.make(tmp_path, dataloader_num_workers=2)
    assert max(run(trainer, recorder)) <= EXACT


@pytest.mark.parametrize("settings", [{}, {"microbatch": 2}])
def test_second_call_is_a_no_op(tmp_path: Path, settings):
    trainer, _ = cases.make(tmp_path)
    exact(trainer, microbatch=2)
    kind = type(trainer)
    assert exact(trainer, **settings) is trainer
    assert type(trainer) is kind


def test_second_call_with_other_settings_is_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path)
    exact(trainer, microbatch=2)
    with pytest.raises(bigbatch.InputError, match=r"^exact\(\) was called before on this MeanLoss with other settings"):
        exact(trainer, microbatch=3)


def test_settings_are_replaced_after_a_failed_first_window(tmp_path: Path):
    """As the message of the refusal asks for."""
    weight = torch.linspace(1.0, 10.0, ref.VOCABULARY, dtype=torch.float64)

    class Weighted(cases.MeanLoss):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(inputs["tokens"]).flatten(0, 1)
            return torch.nn.functional.cross_entropy(
                logits, inputs["labels"].flatten(), weight, ignore_index=ref.IGNORED
            )

    def total_weight(inputs):
        labels = inputs["labels"].flatten()
        return float(weight[labels[labels != ref.IGNORED]].sum())

    trainer, _ = cases.make(tmp_path, Weighted)
    with pytest.raises(bigbatch.InputError, match="class weights"):
        exact(trainer).train()
    with pytest.raises(bigbatch.InputError, match=r"^items= does not count what the loss of Weighted"):
        exact(trainer, items=cases.num_labels).train()
    exact(trainer, items=total_weight).train()
    assert trainer.bigbatch_report.items > 0


def test_exact_after_weights_is_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path)
    weights(trainer, items=cases.num_labels)
    with pytest.raises(bigbatch.InputError, match=r"^weights\(\) was called on this MeanLoss, whose micro-batches"):
        exact(trainer)
