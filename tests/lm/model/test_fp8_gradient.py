"""The cosine of the gradients with and without products in float8, and what is left as it was."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.fp8_gradient import Fp8Gradient, compare_gradients
from bigbatch.lm.model.setup import ModelSetup, set_up_model
from support.emulated_fp8 import llama, needs_torchao, quiet_torchao, samples

pytestmark = quiet_torchao
CPU = torch.device("cpu")


def model_setup(precision: str = "fp8", **settings: Any) -> ModelSetup:
    config = TrainConfig(model="base", max_length=17, **settings).resolved()
    return set_up_model(llama(), config, DeviceSpec(CPU, precision), pad_id=0, longest=17)


def gradient_of(prepared: ModelSetup) -> Tensor:
    """The gradient of all samples, each in a micro-batch of its own, as one vector in float64."""
    for sample in samples():
        prepared.loss_fn(prepared.model, prepared.collate([sample]))[0].backward()
    found = [parameter.grad.double().flatten() for parameter in prepared.model.parameters()]
    prepared.model.zero_grad()
    return torch.cat(found)


@needs_torchao
@pytest.mark.parametrize("mode", ["none", "full"])
def test_cosine_is_that_of_whole_gradients(mode: str) -> None:
    prepared = model_setup(gradient_checkpointing=mode)
    found = compare_gradients(prepared, samples(), CPU)
    narrow, wide = gradient_of(prepared), gradient_of(model_setup("bf16"))
    assert found is not None
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(narrow, wide, dim=0)), abs=1e-6)
    assert found.relative_difference == pytest.approx(float((narrow - wide).norm() / wide.norm()), rel=1e-3)
    assert found.num_samples == 5
    assert 0.98 < found.cosine < 0.9999  # of bf16 alone, it would be 1


@needs_torchao
def test_comparison_leaves_model_as_it_was() -> None:
    prepared = model_setup(gradient_checkpointing="selective")
    assert prepared.layers is not None
    prepared.layers.compile("eager")
    calls = [layer._compiled_call_impl for layer in prepared.model.model.layers]
    parameter = next(prepared.model.parameters())
    parameter.grad = torch.ones_like(parameter)
    state = torch.get_rng_state()
    compare_gradients(prepared, samples()[:1], CPU)
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert torch.equal(torch.get_rng_state(), state)
    assert prepared.layers.mode == "selective"
    assert prepared.layers.is_compiled
    after = [layer._compiled_call_impl for layer in prepared.model.model.layers]
    assert [type(call) for call in after] == [type(call) for call in calls]
    assert after[1] is calls[1]  # the one that does not recompute is the compiled function itself
    assert {type(layer).__name__ for layer in prepared.fp8.layers.values()} == {"Float8Linear"}  # type: ignore[union-attr]


@needs_torchao
def test_compiled_layers_may_differ_as_fp8_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigbatch.lm.model.compilation.COMPILED_TOLERANCE_HALF", 0.0)
    torch._dynamo.reset()
    prepared = model_setup(compile="layers")  # refused if the results differ by more
    assert prepared.layers is not None
    assert prepared.layers.is_compiled
    (loss, _), before = prepared.loss_fn(prepared.model, prepared.collate(samples())), counters["stats"]
    assert torch.isfinite(loss)
    assert before["unique_graphs"] >= 1
    torch._dynamo.reset()


def test_other_precisions_are_not_compared() -> None:
    assert compare_gradients(model_setup("bf16"), samples(), CPU) is None


@needs_torchao
def test_zero_gradient_has_no_cosine() -> None:
    untrained = [sample | {"labels": torch.full_like(sample["labels"], -100)} for sample in samples()[:2]]
    found = compare_gradients(model_setup(), untrained, CPU)
    assert found is not None
    assert math.isnan(found.cosine)
    assert math.isnan(found.relative_difference)
    assert str(found) == "fp8: the gradient of the first 2 samples is zero or not finite, so its error is not known"


def test_line_has_the_cosine() -> None:
    line = str(Fp8Gradient(0.99871, 0.05, 4))
    assert line == "fp8: cosine of the gradient with that of bf16 products 0.9987 (first 4 samples)"
    assert str(Fp8Gradient(1.0, 0.0, 1)).endswith("1.0000 (first sample)")
