"""Products in float8: which layers have them, their values, and what they leave as it is."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from bigbatch import Engine
from bigbatch.errors import InputError
from bigbatch.gradients.fusable_layers import find_fusable_layers
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.dataset import collate
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.adapters import add_lora
from bigbatch.lm.model.causal_lm_loss import CausalLMLoss
from bigbatch.lm.model.fp8 import Fp8Layers, convertible_layers, use_fp8
from support.emulated_fp8 import VOCABULARY, llama, needs_torchao, quiet_torchao, samples

pytestmark = quiet_torchao
CPU = torch.device("cpu")
FP8 = DeviceSpec(CPU, "fp8")
CONFIG = TrainConfig(model="base")
E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)  # bits of the mantissa, smallest exponent of normal numbers, largest
UNIT = 2.0**-24  # half the distance of float32 numbers, relative


def converted(model: Any) -> Fp8Layers:
    found = use_fp8(model, CONFIG, FP8)
    assert found is not None
    return found


def rounded(values: Tensor, kind: tuple[int, int, float]) -> Tensor:
    """Values as float8 numbers under the largest power of two that leaves them in range, in float64."""
    bits, smallest, largest = kind
    values = values.double()
    scale = 2.0 ** torch.floor(torch.log2(largest / values.abs().max()))
    scaled = values * scale
    exponents = torch.floor(torch.log2(scaled.abs())).clamp(min=smallest)
    step = 2.0 ** (exponents - bits)
    return torch.round(scaled / step) * step / scale  # halves to even


def layer_and_values(*, target: str = "cpu") -> tuple[nn.Linear, Tensor, Tensor]:
    found = use_fp8(llama(mlp_bias=True), CONFIG, FP8, target=torch.device(target))
    assert found is not None
    layer, tokens = found.layers["model.layers.1.mlp.up_proj"], 7
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(tokens, layer.in_features, generator=generator)
    gradient = torch.randn(tokens, layer.out_features, generator=generator)
    nn.init.normal_(layer.bias, generator=generator)
    return layer, inputs.requires_grad_(), gradient


def assert_product(found: Tensor, one: Tensor, other: Tensor, more: Tensor | float = 0.0) -> None:
    """Check a float32 sum of exact products against float64: n terms have a relative error of at most n·2⁻²⁴ each."""
    expected = one @ other + more
    terms = one.shape[1] + 2  # and the bias, and the rounding of the result
    bound = terms * UNIT / (1 - terms * UNIT) * (one.abs() @ other.abs() + abs(more))
    assert ((found.double() - expected).abs() <= bound).all()


@needs_torchao
@pytest.mark.parametrize("target", ["cpu", "cuda"])  # emulated, and by the operator of CUDA, which has a CPU kernel
def test_products_are_those_of_rounded_values(target: str) -> None:
    layer, inputs, gradient = layer_and_values(target=target)
    config: Any = layer.linear_mm_config
    assert [product.emulate for product in config] == [target == "cpu"] * 3
    output = layer(inputs)
    output.backward(gradient)
    assert inputs.grad is not None
    assert layer.weight.grad is not None
    x, w, g = rounded(inputs.detach(), E4M3), rounded(layer.weight.detach(), E4M3), rounded(gradient, E5M2)
    assert_product(output.detach(), x, w.T, layer.bias.detach().double())
    assert_product(inputs.grad, g, w)
    assert_product(layer.weight.grad, g.T, x)
    unrounded = inputs.detach().double() @ layer.weight.detach().double().T
    assert (x @ w.T - unrounded).norm() > 0.01 * unrounded.norm()  # far more than the bounds


@needs_torchao
def test_equal_values_round_equally_in_every_cut() -> None:
    layer, inputs, gradient = layer_and_values()
    with torch.no_grad():
        inputs[0] *= 1000 / inputs[0].abs().max()  # the largest values are in the first micro-batch alone
        inputs[inputs.abs() < 0.1] = 0.1  # and none is below 1/14,336 of it
    layer(inputs).backward(gradient)
    assert layer.weight.grad is not None
    whole, layer.weight.grad = layer.weight.grad.double(), None
    for part in (slice(0, 2), slice(2, 7)):
        layer(inputs[part]).backward(gradient[part])
    largest = 1.125 * gradient.double().abs().T @ (1.0625 * inputs.detach().double().abs())  # after rounding to float8
    bound = 2 * len(inputs) * UNIT * largest  # of two sums in float32
    assert ((layer.weight.grad.double() - whole).abs() <= bound).all()


@needs_torchao
def test_linear_layers_of_decoder_layers_are_converted() -> None:
    model = llama()
    found = converted(model)
    assert str(found).startswith("14 of 15 linear layers (tensorwise, torchao ")
    assert found.note == (
        f"fp8: {found}; not the update of bf16: the gradient is that of products in fp8, whose rounding depends on the "
        "micro-batch"
    )
    assert type(model.lm_head) is nn.Linear
    assert {type(layer).__name__ for layer in found.layers.values()} == {"Float8Linear"}
    assert all(model.get_submodule(name) is layer for name, layer in found.layers.items())


def names_of(model: Any) -> set[str]:
    return {".".join(name.split(".")[-2:]) for name, _ in convertible_layers(model)}


def test_layers_of_other_sizes_are_left_out() -> None:
    assert names_of(llama(intermediate_size=40)) == {f"self_attn.{name}_proj" for name in "qkvo"}
    assert names_of(llama(hidden_size=24, num_attention_heads=3)) == set()


def test_layers_with_shared_weights_are_left_out() -> None:
    model = llama()
    first, second = (layer.self_attn for layer in model.model.layers)
    first.q_proj.weight = second.q_proj.weight
    assert "self_attn.q_proj" not in names_of(model)
    assert "self_attn.k_proj" in names_of(model)


def test_routers_of_experts_are_left_out() -> None:
    size = {"hidden_size": 32, "moe_intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    experts = {"num_experts": 16, "shared_expert_intermediate_size": 32}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**size, **experts, vocab_size=VOCABULARY))
    found = names_of(model)
    assert "shared_expert.up_proj" in found
    assert not {name for name in found if name.endswith(("gate", "router"))}
    model.model.layers[0].mlp.gate = nn.Linear(32, 16)  # as in models whose routers are linear layers
    assert "mlp.gate" not in names_of(model)


@needs_torchao
@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed:FutureWarning")  # raised by peft
def test_adapters_are_not_converted() -> None:
    model = add_lora(llama(), rank=16, alpha=16, seed=0)
    found = converted(model)
    assert str(found).startswith("14 of 15 linear layers")
    assert {name.rpartition(".")[2] for name in found.layers} == {"base_layer"}
    adapters = [module for name, module in model.named_modules() if ".lora_A." in name]
    assert adapters
    assert {type(module) for module in adapters} == {nn.Linear}


@needs_torchao
def test_other_models_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCABULARY))
    with pytest.raises(InputError) as caught:
        use_fp8(model, CONFIG, FP8)
    assert str(caught.value) == (
        "--precision fp8 is not supported for base: its decoder layers have no linear layers of torch with multiples "
        "of 16 inputs and outputs. Use --precision bf16."
    )


def test_missing_torchao_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(InputError) as caught:
        use_fp8(llama(), CONFIG, FP8)
    message = str(caught.value)
    assert message.startswith("--precision fp8 needs torchao, which cannot be imported (")
    assert message.endswith('): pip install "bigbatch[fp8]".')


def test_other_precisions_change_nothing() -> None:
    model = llama()
    assert use_fp8(model, CONFIG, DeviceSpec(CPU, "bf16")) is None
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


@needs_torchao
def test_parameters_keep_names_dtypes_and_values() -> None:
    model, before = llama(), llama().state_dict()
    parameters = dict(model.named_parameters())
    converted(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


@needs_torchao
def test_disabled_products_are_those_of_linear_layers() -> None:
    model, plain, tokens = llama(), llama(), torch.arange(9)[None]
    found = converted(model)
    expected, in_fp8 = plain(tokens).logits, model(tokens).logits
    with found.disabled():
        assert torch.equal(model(tokens).logits, expected)
    assert torch.equal(model(tokens).logits, in_fp8)
    assert not torch.equal(in_fp8, expected)


@needs_torchao
def test_layers_are_put_back() -> None:
    model = llama()
    found = converted(model)
    layer = model.model.layers[0].mlp
    plain = layer.up_proj
    layer.up_proj = nn.Linear(32, 48, bias=False)
    found.install(model)
    assert layer.up_proj is plain


@needs_torchao
@pytest.mark.parametrize("fuses", [False, True])
def test_update_is_sum_over_its_microbatches(fuses: bool) -> None:
    model, loss_fn = llama(), CausalLMLoss(FP8, needs_mask=False, longest=17)
    converted(model)

    def pad(chosen: Any) -> dict[str, Tensor]:
        return collate(list(chosen), pad_id=0)

    window = sorted(samples(), key=lambda sample: -len(sample["input_ids"]))
    expected: dict[str, Tensor] = {}
    count = 0
    for part in (window[:2], window[2:4], window[4:]):
        loss, items = loss_fn(model, pad(part))
        loss.backward()
        count += int(items)
    expected = {name: p.grad / count for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parameters = [p for p in model.parameters() if p.requires_grad]
    engine = Engine(
        model, torch.optim.SGD(parameters), loss_fn, microbatch=2, collate=pad, fuse_gradients=fuses, check=False
    )
    engine.backward(window)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-5, atol=1e-7), name


@needs_torchao
def test_gradients_of_converted_layers_are_not_fused() -> None:
    model = llama()
    found = find_fusable_layers(model, model.parameters())
    assert len(found.layers) == 16
    fp8 = converted(model)
    found = find_fusable_layers(model, model.parameters())
    assert {type(layer.module) for layer in found.layers} == {nn.Linear, nn.Embedding}
    assert found.reasons.keys() == fp8.layers.keys()
    assert set(found.reasons.values()) == {"it is a Float8Linear, and not exactly an nn.Linear"}
