"""Errors of a user's own functions name the function; an own training_step is right, or refused."""

import re
from pathlib import Path

import pytest
import torch
from transformers import Trainer

import bigbatch
from bigbatch.integrations.transformers import exact, verify, weights
from integrations.transformers import trainer_cases as cases
from support import full_batch_reference as ref
from support import tiny_trainers as tiny

EXACT = 1e-12


def fail(*_args, **_kwargs):
    raise LookupError("no such column\nand a second line")


class FailingLoss(cases.MeanLoss):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        fail()


class NoTensor(cases.MeanLoss):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs=True)


class Detached(cases.MeanLoss):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs).detach()


def error_of(trainer, *calls) -> bigbatch.InputError:
    with pytest.raises(bigbatch.InputError) as caught:
        (calls or (trainer.train,))[0]()
    return caught.value


@pytest.mark.parametrize("items", ["auto", cases.num_labels], ids=["auto", "given"])
@pytest.mark.parametrize("proves", [False, True], ids=["train", "verify"])
def test_failing_loss_is_named(tmp_path: Path, items, *, proves: bool):
    trainer, _ = cases.make(tmp_path, FailingLoss)
    exact(trainer, items=items)
    error = error_of(trainer, *([lambda: verify(trainer)] if proves else []))
    assert str(error) == (
        "compute_loss of FailingLoss raised LookupError: no such column. The traceback before this one shows where."
    )
    assert isinstance(error.__cause__, LookupError)
    assert error.__cause__.__traceback__.tb_next is not None


@pytest.mark.parametrize("proves", [False, True], ids=["train", "verify"])
def test_failing_collator_is_named(tmp_path: Path, *, proves: bool):
    trainer, _ = cases.make(tmp_path, collator=fail)
    exact(trainer)
    error = error_of(trainer, *([lambda: verify(trainer)] if proves else []))
    assert str(error).startswith("the data collator of MeanLoss (fail) raised LookupError: no such column.")
    assert isinstance(error.__cause__, LookupError)


@pytest.mark.parametrize("name", ["items", "lengths"])
def test_failing_functions_of_exact_are_named(tmp_path: Path, name: str):
    trainer, _ = cases.make(tmp_path)
    settings = {"items": cases.num_labels, "microbatch": bigbatch.TokenBudget(30), "lengths": lambda rows: [1] * 12}
    exact(trainer, **settings | {name: fail})
    assert str(error_of(trainer)).startswith(f"{name}= raised LookupError: no such column.")


def test_error_of_bigbatch_keeps_its_class(tmp_path: Path):
    class Stops(cases.MeanLoss):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            raise bigbatch.NonFiniteError("mine")

    trainer, _ = cases.make(tmp_path, Stops)
    with pytest.raises(bigbatch.NonFiniteError, match=r"^mine$"):
        exact(trainer, items=cases.num_labels).train()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (NoTensor, {}, "compute_loss of NoTensor returned a tuple: return the mean loss, a 0-d tensor"),
        (Detached, {"items": cases.num_labels}, "the loss"),
        (cases.MeanLoss, {"items": lambda inputs: float("nan")}, "items= returned nan: it must return the number"),
        (cases.MeanLoss, {"items": lambda inputs: -1}, "items= returned -1: it must return the number of items"),
        (cases.MeanLoss, {"memory": "a lot"}, "memory"),
    ],
    ids=["no tensor", "detached", "nan items", "negative items", "memory"],
)
def test_refusals_are_input_errors(tmp_path: Path, kind, settings, message: str):
    trainer, _ = cases.make(tmp_path, kind)
    with pytest.raises(bigbatch.InputError) as caught:
        exact(trainer, **settings).train()
    assert str(caught.value).startswith(message)


def test_memory_sentence_is_recovered_from(tmp_path: Path):
    class Small(cases.MeanLoss):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if len(inputs["tokens"]) == cases.BATCH:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
            return super().compute_loss(model, inputs)

    trainer, recorder = cases.make(tmp_path, Small, max_steps=1)
    exact(trainer, items=cases.num_labels).train()
    parts = cases.windows(trainer.train_dataset)[:1]
    assert max(cases.errors(recorder, ref.make_model(), parts)) <= EXACT
    assert trainer.bigbatch_report.retries > 0


# training_step ----------------------------------------------------------------------------------------------------


class OldStep(cases.MeanLoss):
    """A training_step without the number of items, from before it was passed."""

    def training_step(self, model, inputs):
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


class PopsWeights(cases.MeanLoss):
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.sample_weights = inputs.pop("sample_weights", None)
        return super().training_step(model, inputs, num_items_in_batch)


class WritesInputs(cases.MeanLoss):
    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs["sample_weights"] = torch.ones(4)
        return super().training_step(model, inputs, num_items_in_batch)


class UpdatesInputs(cases.MeanLoss):
    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs.update(sample_weights=torch.ones(4))
        return super().training_step(model, inputs, num_items_in_batch)


class CopiesInputs(cases.MeanLoss):
    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = {name: value for name, value in inputs.items() if name != "index"}
        return super().training_step(model, inputs, num_items_in_batch)


class OwnForward(cases.MeanLoss):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**inputs).mean()
        self.accelerator.backward(loss)
        return loss.detach()


class NoLoss(cases.MeanLoss):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return torch.zeros(())


class AsksForOutputs(cases.MeanLoss):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss, _ = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        self.accelerator.backward(loss)
        return loss.detach()


REFUSED_STEPS = [
    (PopsWeights, "'sample_weights' was read from a batch of a trainer that exact() was called on"),
    (WritesInputs, "'sample_weights' was written to a batch of a trainer that exact() was called on"),
    (UpdatesInputs, "'sample_weights' was written to a batch of a trainer that exact() was called on"),
    (CopiesInputs, "training_step of CopiesInputs uses a copy of its inputs, which is empty"),
    (OwnForward, "training_step of OwnForward did not pass its inputs to self.compute_loss and raised TypeError:"),
    (NoLoss, "training_step of NoLoss did not pass its inputs to self.compute_loss. They are a whole window"),
    (AsksForOutputs, "training_step of AsksForOutputs asks self.compute_loss for outputs"),
]


@pytest.mark.parametrize(("kind", "message"), REFUSED_STEPS, ids=[kind.__name__ for kind, _ in REFUSED_STEPS])
def test_steps_that_miss_the_window_are_refused(tmp_path: Path, kind, message: str):
    trainer, _ = cases.make(tmp_path, kind)
    before = ref.parameters_of(trainer.model)
    assert str(error_of(exact(trainer, items=cases.num_labels))).startswith(message)
    assert ref.relative_error(ref.parameters_of(trainer.model), before) == 0


def test_step_of_the_older_form_is_exact(tmp_path: Path):
    trainer, recorder = cases.make(tmp_path, OldStep)
    exact(trainer).train()
    assert max(cases.errors(recorder, ref.make_model(), cases.windows(trainer.train_dataset))) <= EXACT


def test_divided_result_is_refused(tmp_path: Path):
    class Divides(cases.MeanLoss):
        def training_step(self, model, inputs):
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach() / self.args.gradient_accumulation_steps

    trainer, _ = cases.make(tmp_path, Divides)
    assert str(error_of(exact(trainer))).startswith(
        "training_step of Divides returns the loss divided by gradient_accumulation_steps (3)"
    )


class DividesByArgument(cases.MeanLoss):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs)) / self.args.gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


class ScaledItself(OldStep):
    loss_is_scaled_for_ga = True


@pytest.mark.parametrize("kind", [OldStep, DividesByArgument, ScaledItself])
def test_weights_are_right_in_own_steps(tmp_path: Path, kind):
    trainer, recorder = cases.make(tmp_path, kind)
    weights(trainer, items=cases.num_labels).train()
    assert max(cases.errors(recorder, ref.make_model(), cases.windows(trainer.train_dataset))) <= EXACT


class Halves(cases.MeanLoss):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss / 7)
        return loss.detach()


class SkipsLoss(cases.MeanLoss):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = ref.loss_mean(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


class SkipsPreparation(cases.MeanLoss):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


class CallsTwice(cases.MeanLoss):
    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs) + self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


UNWEIGHTED_STEPS = [
    (Halves, "training_step of Halves multiplies the loss of a micro-batch by 0.142857, and it is weighted already"),
    (SkipsLoss, "training_step of SkipsLoss did not call self._prepare_inputs(inputs) and then self.compute_loss("),
    (SkipsPreparation, "training_step of SkipsPreparation calls self.compute_loss twice, or before"),
    (CallsTwice, "training_step of CallsTwice calls self.compute_loss twice, or before"),
]


@pytest.mark.parametrize(("kind", "message"), UNWEIGHTED_STEPS, ids=[kind.__name__ for kind, _ in UNWEIGHTED_STEPS])
def test_steps_that_miss_their_weight_are_refused(tmp_path: Path, kind, message: str):
    trainer, _ = cases.make(tmp_path, kind)
    assert str(error_of(weights(trainer, items=cases.num_labels))).startswith(message)


@pytest.mark.parametrize("count", [-1, float("nan")])
def test_weights_refuse_invalid_counts(tmp_path: Path, count: float):
    trainer, _ = cases.make(tmp_path)
    error = error_of(weights(trainer, items=lambda inputs: count))
    assert re.match(r"items= returned \[(-1\.0|nan), .*it must return the number of items", str(error))


def test_weights_refuse_what_is_no_number(tmp_path: Path):
    trainer, _ = cases.make(tmp_path)
    assert str(error_of(weights(trainer, items=lambda inputs: inputs["labels"]))) == (
        "items= returned a Tensor: it must return the number of items of a micro-batch, a number or a 0-d tensor."
    )
    error = error_of(weights(trainer, items=fail))
    assert str(error).startswith("items= raised LookupError: no such column.")


class Predicts(tiny.Regression):
    def forward(self, x, labels=None):
        return {"logits": self.layers(x).squeeze(-1)}


def test_loss_function_is_named(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, Trainer, Predicts(), tiny.regression_samples(), tiny.collate_regression)
    trainer.compute_loss_func = fail
    assert str(error_of(exact(trainer))).startswith("compute_loss of Trainer (compute_loss_func=fail) raised LookupErr")


def test_budget_below_a_sample_is_an_input_error(tmp_path: Path):
    trainer, _ = cases.make(tmp_path)
    exact(trainer, items=cases.num_labels, microbatch=bigbatch.TokenBudget(3), lengths=lambda rows: [4] * len(rows))
    assert "4" in str(error_of(trainer))


def test_weights_with_deepspeed_need_the_stock_step(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, OldStep)
    trainer.accelerator.state.distributed_type = type(trainer.accelerator.distributed_type)("DEEPSPEED")
    try:
        with pytest.raises(bigbatch.InputError) as caught:
            weights(trainer, items=cases.num_labels)
    finally:
        trainer.accelerator.state.distributed_type = type(trainer.accelerator.distributed_type)("NO")
    assert str(caught.value).startswith("training_step of OldStep calls the backward itself, and the factor of its")
