"""Weighted micro-batches have the gradient of the whole batch, in the Trainer's own loop."""

import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback

from bigbatch.errors import InputError
from bigbatch.integrations.transformers import exact, weights
from integrations.transformers import trainer_cases as cases
from support import full_batch_reference as ref
from support import tiny_trainers as tiny
from support.accelerate_ranks import known_to_accelerate

EXACT = 1e-12
WRONG = 0.05


class MeanUnlessGiven(cases.MeanLoss):
    """Scales its loss itself, as online trainers do."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs)
        return loss / self.current_gradient_accumulation_steps


def errors_of(trainer, recorder):
    trainer.train()
    return cases.errors(recorder, ref.make_model(), cases.windows(trainer.train_dataset))


@pytest.mark.parametrize("kind", [cases.MeanLoss, MeanUnlessGiven])
def test_each_window_has_whole_batch_gradient(tmp_path: Path, kind):
    errors = errors_of(*cases.make(tmp_path, kind))
    assert min(errors) >= WRONG
    trainer, recorder = cases.make(tmp_path, kind)
    errors = errors_of(weights(trainer, items=cases.num_labels), recorder)
    assert len(errors) == 3
    assert max(errors) <= EXACT


def test_logged_loss_is_the_mean_of_the_window(tmp_path: Path):
    trainer, _ = cases.make(tmp_path)
    weights(trainer, items=cases.num_labels).train()
    model = ref.make_model()
    expected = float(ref.loss_mean(model, cases.windows(trainer.train_dataset)[0]).detach())
    assert abs(trainer.state.log_history[0]["loss"] - expected) < 1e-6


def test_counts_may_be_tensors(tmp_path: Path):
    trainer, recorder = cases.make(tmp_path)
    weights(trainer, items=lambda inputs: (inputs["labels"] != ref.IGNORED).sum())
    assert max(errors_of(trainer, recorder)) <= EXACT


def test_microbatch_without_items_has_no_gradient(tmp_path: Path):
    data = cases.samples()
    for sample in data[:4]:
        sample["labels"] = torch.full_like(sample["labels"], ref.IGNORED)
    trainer, recorder = cases.make(tmp_path, dataset=data)
    assert max(errors_of(weights(trainer, items=cases.num_labels), recorder)) <= EXACT


def test_evaluation_is_not_weighted():
    data = tiny.token_samples(9)
    stock, weighted = (tiny.trainer_of(tiny.gpt2(), data) for _ in range(2))
    weights(weighted, items=cases.num_labels)
    assert weighted.evaluate(data)["eval_loss"] == stock.evaluate(data)["eval_loss"]


class Online(Trainer):
    """Makes its inputs when they are prepared, a new batch of them every second step."""

    _step = 0

    def _prepare_inputs(self, inputs):
        if self._step % 2 == 0:
            self.made = [super()._prepare_inputs(inputs), self.extra]
        return self.made[self._step % 2]

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self._step += 1
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return ref.loss_mean(model, inputs)


def test_items_are_those_of_prepared_inputs(tmp_path: Path):
    data = cases.samples(8)
    trainer, recorder = cases.make(tmp_path, Online, dataset=data, gradient_accumulation_steps=2)
    other = cases.samples(3, seed=9)
    trainer.extra = cases.collate(other)
    weights(trainer, items=cases.num_labels).train()
    whole = cases.collate([dict(row) for row in [*data[:4], *other]])
    assert max(cases.errors(recorder, ref.make_model(), [whole])) <= EXACT


def test_second_call_replaces_items(tmp_path: Path):
    trainer, recorder = cases.make(tmp_path)
    weights(trainer, items=lambda inputs: 1)
    kind = type(trainer)
    assert type(weights(trainer, items=cases.num_labels)) is kind
    assert max(errors_of(trainer, recorder)) <= EXACT


def test_invalid_arguments_are_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path)
    with pytest.raises(InputError, match=r"items is 'auto': pass a function from the inputs of a micro-batch"):
        weights(trainer, items="auto")
    with pytest.raises(InputError, match=r"trainer is a Linear: pass a transformers\.Trainer"):
        weights(torch.nn.Linear(1, 1), items=cases.num_labels)
    with pytest.raises(InputError, match=r"exact\(\) was called on this ExactMeanLoss"):
        weights(exact(trainer, items=cases.num_labels), items=cases.num_labels)


# Two ranks.


def _errors_on_ranks(is_weighted):
    """Return the errors of updates, on this rank, against the whole batches of both ranks."""
    with known_to_accelerate(), tempfile.TemporaryDirectory() as folder:
        data = cases.samples(40)  # 24 samples in the first window of two ranks, 16 in the last one
        trainer, recorder = cases.make(Path(folder), dataset=data)
        if is_weighted:
            weights(trainer, items=cases.num_labels)
        trainer.train()
        found = [{name.removeprefix("module."): g for name, g in each.items()} for each in recorder.gradients]
        recorder.gradients = found
        recorder.weights = [{n.removeprefix("module."): w for n, w in each.items()} for each in recorder.weights]
        return cases.errors(recorder, ref.make_model(), cases.windows(data, size=24))


def test_windows_of_two_ranks_are_exact(pools):
    stock, weighted = (pools(2).run(_errors_on_ranks, is_weighted) for is_weighted in (False, True))
    assert min(stock[0]) >= WRONG
    assert [len(errors) for errors in weighted] == [2, 2]
    assert max(weighted[0] + weighted[1]) <= EXACT


def test_loss_that_requires_a_number_of_items_is_refused(tmp_path: Path):
    class OverNumber(cases.MeanLoss):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return ref.loss_and_items(model, inputs)[0] / num_items_in_batch

    trainer, _ = cases.make(tmp_path, OverNumber)
    with pytest.raises(InputError) as caught:
        weights(trainer, items=cases.num_labels).train()
    assert str(caught.value) == (
        "compute_loss of OverNumber failed without num_items_in_batch (unsupported operand type(s) for /: 'Tensor' and "
        "'NoneType'), and weights() calls it so: return the mean over the micro-batch if num_items_in_batch is None."
    )


class Stream(torch.utils.data.IterableDataset):
    """Samples of unknown number."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def test_stream_that_ends_within_a_window_continues_it(tmp_path: Path):
    """The Trainer makes no update there, and keeps the gradient."""
    samples = cases.samples(20)  # windows of 12: one, and 8 samples that no update follows
    trainer, recorder = cases.make(tmp_path, dataset=Stream(samples), max_steps=4)
    weights(trainer, items=cases.num_labels).train()
    windows = [samples[:12], *[samples[12:] + samples[:12]] * 3]
    assert max(cases.errors(recorder, ref.make_model(), [cases.collate(window) for window in windows])) <= EXACT
    model = ref.make_model()
    tail = cases.collate(samples[12:])
    model.load_state_dict(recorder.weights[1])
    losses = [float(ref.loss_mean(model, batch).detach()) for batch in (tail, cases.collate(samples[:12]))]
    counts = [cases.num_labels(batch) for batch in (tail, cases.collate(samples[:12]))]
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert abs(trainer.state.log_history[1]["loss"] - expected) < 1e-6


class Clears(TrainerCallback):
    """Drops what no update followed, at the end of an epoch."""

    def __init__(self, set_to_none):
        self.set_to_none = set_to_none

    def on_epoch_end(self, args, state, control, model=None, **_):
        model.zero_grad(set_to_none=self.set_to_none)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradient_that_was_cleared_does_not_count(tmp_path: Path, set_to_none):
    samples = cases.samples(20)
    trainer, recorder = cases.make(tmp_path, dataset=Stream(samples), max_steps=3, callbacks=[Clears(set_to_none)])
    weights(trainer, items=cases.num_labels).train()
    windows = [cases.collate(samples[:12])] * 3
    assert max(cases.errors(recorder, ref.make_model(), windows)) <= EXACT


def test_gradient_that_another_engine_keeps_is_refused(tmp_path: Path, monkeypatch):
    samples = cases.samples(20)
    trainer, _ = cases.make(tmp_path, dataset=Stream(samples), max_steps=2)
    weights(trainer, items=cases.num_labels)
    known = type(trainer.accelerator).distributed_type.fget
    kind = types.SimpleNamespace(value="DEEPSPEED")

    def distributed_type(accelerator):
        called_by = sys._getframe(1).f_code.co_name
        return kind if called_by == "_bigbatch_weights_has_gradient" else known(accelerator)

    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", property(distributed_type))
    with pytest.raises(InputError) as caught:
        trainer.train()
    assert str(caught.value) == (
        "the data of MeanLoss ended within a window, and DEEPSPEED keeps the gradient of its last micro-batches, which "
        "cannot be weighted there: use a data set with a length, or as many batches as gradient_accumulation_steps "
        "divides."
    )


def test_second_training_does_not_continue_a_window_of_the_first(tmp_path: Path):
    samples = cases.samples(20)
    trainer, recorder = cases.make(tmp_path, dataset=Stream(samples), max_steps=1)
    weights(trainer, items=cases.num_labels).train()
    trainer.args.max_steps = 2
    trainer.train()
    windows = [samples[:12], samples[:12], samples[12:] + samples[:12]]
    assert max(cases.errors(recorder, ref.make_model(), [cases.collate(window) for window in windows])) <= EXACT


class SumOverInputs(Trainer):
    """A sum over a number of items of several micro-batches, which the inputs have."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, items = ref.loss_and_items(model, {name: inputs[name] for name in ("tokens", "labels")})
        return loss / self.divisor(inputs) if inputs["tokens"].numel() else loss * 0 / items

    def divisor(self, inputs):
        return inputs["num_items_in_batch"]


class SumOverOptionalInputs(SumOverInputs):
    def divisor(self, inputs):
        return inputs.get("num_items_in_batch", 1)


@pytest.mark.parametrize("kind", [SumOverInputs, SumOverOptionalInputs])
def test_loss_over_items_of_several_microbatches_is_refused(tmp_path: Path, kind):
    trainer, _ = cases.make(tmp_path, kind, collator=lambda rows: {**cases.collate(rows), "num_items_in_batch": 60})
    with pytest.raises(InputError) as caught:
        weights(trainer, items=cases.num_labels).train()
    assert str(caught.value) == (
        f"compute_loss of {kind.__name__} reads inputs['num_items_in_batch'], the items of several micro-batches, so "
        "its loss is a sum divided by all of them, and weights() is for means: leave weights() out, or use a loss that "
        'is a mean (of TRL\'s GRPO, a loss_type other than "dapo", "cispo" and "vespo").'
    )
