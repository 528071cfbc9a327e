"""The load-balancing loss over the global batch is that of transformers on the whole batch, for any cut."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bigbatch.batching.plan import TokenBudget
from bigbatch.errors import InputError
from bigbatch.lm.model.expert_balance import own_coefficient, run_router_hooks_eagerly
from bigbatch.lm.model.setup import ModelSetup
from bigbatch.lm.training.engine_factory import make_engine
from bigbatch.lm.training.window_routing import counted_window
from bigbatch.window_report import WindowReport
from support.expert_models import (
    FAMILIES,
    SHAPE,
    expert_model,
    expert_samples,
    gradients,
    relative_error,
    set_up,
    whole_batch,
)
from support.tiers import slow

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch hides it
COEFFICIENT = 0.5
TRANSFORMERS = 1e-7  # its function computes in float32
EXACT = 1e-12
SAMPLES = expert_samples()


def backward(
    model_setup: ModelSetup, cut: int | TokenBudget, samples: list[dict[str, Tensor]] = SAMPLES
) -> tuple[dict[str, Tensor], WindowReport, float]:
    """Return the gradient of a window, its report, and its load-balancing loss."""
    engine = make_engine(model_setup, torch.optim.SGD(model_setup.model.parameters(), lr=0.0), microbatch=cut)
    with counted_window(engine, model_setup, samples) as routing:
        report = engine.backward(samples)
    return gradients(model_setup.model), report, float(routing.loss)


@pytest.mark.parametrize("family", ["mixtral", "qwen2", "qwen2-sparse", "gpt-oss", "qwen3", "olmoe"])
def test_gradient_is_that_of_transformers(family: str) -> None:
    model = expert_model(family)
    expected, own = whole_batch(model, SAMPLES, COEFFICIENT)
    found, report, balancing = backward(set_up(model), 4)
    assert relative_error(found, expected) < TRANSFORMERS
    assert balancing == pytest.approx(own, rel=1e-6)
    without, _ = whole_batch(model, SAMPLES, 0.0)
    assert relative_error(without, expected) > 1e-3, "the term matters"
    assert report.num_microbatches == 6


@pytest.mark.parametrize("family", ["mixtral", "qwen2", "gpt-oss"])
def test_float32_gradient_is_that_of_transformers(family: str) -> None:
    model = expert_model(family, dtype=torch.float32)
    expected, _ = whole_batch(model, SAMPLES, COEFFICIENT)
    assert relative_error(backward(set_up(model, "float32"), 4)[0], expected) < 1e-6


@pytest.mark.parametrize("layout", ["padded", slow("packed")])
def test_every_cut_has_the_same_gradient(layout: str) -> None:
    model = expert_model("qwen2")
    model_setup = set_up(model, layout=layout)
    assert model_setup.layout == layout
    whole, whole_report, _ = backward(model_setup, len(SAMPLES))
    for cut in (*range(1, len(SAMPLES)), TokenBudget(16), TokenBudget(40)):
        found, report, _ = backward(model_setup, cut)
        assert relative_error(found, whole) < EXACT, cut
        assert report.loss == pytest.approx(whole_report.loss, rel=EXACT)
    assert relative_error(whole, whole_batch(model, SAMPLES, COEFFICIENT)[0]) < TRANSFORMERS


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed_layers_have_the_same_gradient(mode: str) -> None:
    model = expert_model("mixtral")
    plain = backward(set_up(model), 4)[0]
    assert relative_error(backward(set_up(model, gradient_checkpointing=mode), 4)[0], plain) < EXACT


@pytest.mark.slow
def test_compiled_layers_have_the_same_gradient() -> None:
    model_setup = set_up(expert_model("mixtral", num_hidden_layers=1))
    assert model_setup.layers is not None
    plain = backward(model_setup, 4)[0]
    run_router_hooks_eagerly(model_setup.model)
    model_setup.layers.compile(backend="eager")
    for mode in ("none", "full"):
        model_setup.layers.set_checkpointing(mode)
        assert relative_error(backward(model_setup, 4)[0], plain) < EXACT
    torch._dynamo.reset()


def test_large_vocabulary_has_the_same_gradient() -> None:
    model = expert_model("mixtral", vocab_size=16_384, num_hidden_layers=1)
    model_setup = set_up(model)
    assert type(model_setup.loss_fn).__name__ == "ChunkedCausalLMLoss"
    assert relative_error(backward(model_setup, 4)[0], whole_batch(model, SAMPLES, COEFFICIENT)[0]) < TRANSFORMERS


def test_lora_trains_what_is_below_frozen_routers() -> None:
    model = expert_model("gpt-oss")
    balanced = set_up(model, lora_rank=2)
    for name, parameter in balanced.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    found = backward(balanced, 4)[0]
    assert relative_error(backward(balanced, 22)[0], found) < EXACT
    assert not any("router" in name for name in found), "the routers are frozen"
    plain = make_engine(balanced, torch.optim.SGD(balanced.model.parameters(), lr=0.0), microbatch=4)
    plain.loss_fn = balanced.loss_fn
    plain.backward(SAMPLES)
    assert relative_error(gradients(balanced.model), found) > 1e-4, "the term reaches the adapters"


def test_microbatch_scope_depends_on_the_cut() -> None:
    model = expert_model("qwen2")
    model_setup = set_up(model, router_aux_loss="microbatch")

    def found(cut: int) -> tuple[dict[str, Tensor], WindowReport]:
        engine = make_engine(model_setup, torch.optim.SGD(model_setup.model.parameters(), lr=0.0), microbatch=cut)
        report = engine.backward(SAMPLES)
        return gradients(model_setup.model), report

    expected, own = whole_batch(model, SAMPLES, COEFFICIENT)
    whole, report = found(len(SAMPLES))
    assert relative_error(whole, expected) < TRANSFORMERS
    assert report.terms["load_balancing"].loss == pytest.approx(COEFFICIENT * own, rel=1e-6)
    assert relative_error(found(2)[0], expected) > 1e-3


def test_loss_outside_of_a_window_is_refused() -> None:
    model_setup = set_up(expert_model("mixtral"))
    engine = make_engine(model_setup, torch.optim.SGD(model_setup.model.parameters(), lr=0.0), microbatch=4)
    with pytest.raises(
        RuntimeError, match="the routing of the whole batch is unknown: call this loss inside of window"
    ):
        engine.backward(SAMPLES)


# which models, and which coefficient ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "coefficient"),
    [({}, 0.25), ({"router_aux_loss_coef": 2.0}, 2.0), ({"router_aux_loss_coef": 0.0}, None)],
)
def test_flag_replaces_coefficient_of_the_model(settings: dict[str, Any], coefficient: float | None) -> None:
    balanced = set_up(expert_model("mixtral", coefficient=0.25), **settings).balanced
    assert (None if balanced is None else balanced.coefficient) == coefficient


def test_model_with_coefficient_zero_has_no_term() -> None:
    model = expert_model("mixtral", coefficient=0.0)
    assert set_up(model).balanced is None
    balanced = set_up(model, router_aux_loss_coef=1.0).balanced
    assert balanced is not None
    assert (balanced.coefficient, balanced.num_experts, balanced.top_k, balanced.scope) == (1.0, 4, 2, "global")


@pytest.mark.parametrize("family", FAMILIES)
def test_coefficient_is_found(family: str) -> None:
    assert own_coefficient(expert_model(family, coefficient=0.125)) == 0.125


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"router_aux_loss_coef": 0.1}, "--router-aux-loss-coef 0.1"),
        ({"router_aux_loss_coef": 0.0}, "--router-aux-loss-coef 0"),
        ({"router_aux_loss": "microbatch"}, "--router-aux-loss microbatch"),
    ],
)
def test_flag_without_experts_is_refused(settings: dict[str, Any], flag: str) -> None:
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 1}))
    with pytest.raises(InputError) as caught:
        set_up(model, "float32", **settings)
    assert str(caught.value) == (
        f"{flag} is for a mixture of experts with a load-balancing loss, and experts has none. Leave it out."
    )


def test_model_with_another_loss_is_not_trained() -> None:
    model = expert_model("mixtral", dtype=torch.float32)
    assert set_up(model, "float32").balanced is not None

    def wrong(*args: Any, forward: Any = model.forward, **options: Any) -> Any:
        output = forward(*args, **options)
        if output.get("aux_loss") is not None:
            output["aux_loss"] = 2 * output["aux_loss"]
        return output

    model.forward = wrong
    assert set_up(model, "float32").balanced is None
    with pytest.raises(InputError, match=r"^--router-aux-loss-coef 1 is not supported for experts: its own is "):
        set_up(model, "float32", router_aux_loss_coef=1.0)


def test_float64_experts_run_one_after_another() -> None:
    model = expert_model("mixtral", dtype=torch.float64)
    assert model.config._experts_implementation == "grouped_mm"
    assert set_up(model, "float64").model.config._experts_implementation == "eager"
    single = set_up(expert_model("mixtral", dtype=torch.float32), "float32").model
    assert single.config._experts_implementation == "grouped_mm"
