"""Models with base weights in 4 bits: which layers, what stays, and the gradient of adapters on them."""

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from bigbatch.errors import InputError
from bigbatch.gradients.loss_totals import as_terms
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.decoder_layers import DecoderLayers
from bigbatch.lm.model.nf4 import Nf4Linear
from bigbatch.lm.model.quantization import (
    count_parameters,
    load_quantized,
    quantization_note,
    quantize_outline,
    quantized_layers,
    weights_dtype_of,
)
from bigbatch.lm.model.setup import ModelSetup, set_up_model
from bigbatch.lm.model.weights import Weights
from support.tiers import slow_except

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
CASES: dict[str, dict[str, Any]] = {
    "padded": {"layout": "padded"},
    "packed": {"layout": "packed"},
    "double": {"quantize": "nf4-double"},
    "checkpointing": {"gradient_checkpointing": "full"},
    "dora": {"dora": True},
    "rslora": {"rslora": True, "lora_targets": "q_proj,down_proj"},
}
LIMITS = {"float64": 1e-12, "float32": 1e-5, "bf16": 2e-2}


def llama(folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> str:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE | more, vocab_size=128)).to(dtype).save_pretrained(folder)
    return str(folder)


def config(model: str, **settings: Any) -> TrainConfig:
    return TrainConfig(model=model, **{"lora_rank": 4, "quantize": "nf4", "device": "cpu"} | settings).resolved()


def set_up(name: str, precision: str = "float32", **settings: Any) -> ModelSetup:
    """Set up a quantized model with adapters that are not neutral."""
    asked, spec = config(name, **settings), DeviceSpec(CPU, precision)
    base = load_quantized(asked, spec)
    prepared = set_up_model(base.model, asked, spec, pad_id=0, longest=16)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in prepared.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return prepared


def dequantized(model: Any, dtype: torch.dtype) -> Any:
    """Copy a model, with plain linear layers of the same weights."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Nf4Linear):
                plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None, dtype=dtype)
                plain.weight = nn.Parameter(child.dequantized(dtype), requires_grad=False)
                setattr(module, name, plain)
    return model


def gradient(prepared: ModelSetup, model: Any) -> Tensor:
    """Return the gradient of the adapters on three ragged sequences."""
    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randint(1, 128, (length,), generator=generator) for length in (16, 9, 5)]
    microbatch = prepared.collate([{"input_ids": t, "labels": t.roll(-1)} for t in tokens])
    terms = as_terms(prepared.training_loss(model, microbatch)).values()
    loss = torch.stack([term_sum for term_sum, _ in terms]).sum()
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, trained)])


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def assert_gradient_is_that_on_dequantized_weights(prepared: ModelSetup, precision: str) -> None:
    num_layers = prepared.model.config.num_hidden_layers
    assert sum(isinstance(module, Nf4Linear) for module in prepared.model.modules()) == 7 * num_layers
    found = gradient(prepared, prepared.model)
    assert prepared.layers is not None
    prepared.layers.decompile()
    plain = dequantized(prepared.model, weights_dtype_of(config("x"), DeviceSpec(CPU, precision)))
    assert not any(isinstance(module, Nf4Linear) for module in plain.modules())
    expected = gradient(prepared, plain)
    assert expected.norm() > 0
    assert distance(found, expected) <= LIMITS[precision]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", slow_except(LIMITS, "float32", "bf16"))
def test_gradient_of_adapters_is_that_on_dequantized_weights(tmp_path: Path, case: str, precision: str) -> None:
    if precision == "bf16" and case == "packed":
        pytest.skip("rows are packed on the CPU in float32 and float64 only")
    prepared = set_up(llama(tmp_path), precision, **CASES[case])
    assert_gradient_is_that_on_dequantized_weights(prepared, precision)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_gradient_of_compiled_adapters_is_that_on_dequantized_weights(tmp_path: Path) -> None:
    """One layer has every kernel: Inductor and g++ take ten seconds for each graph, two layers have two graphs."""
    name = llama(tmp_path, num_hidden_layers=1)
    settings = {"layout": "packed", "gradient_checkpointing": "selective", "lora_targets": "q_proj,down_proj"}
    prepared = set_up(name, "float32", compile="none", **settings)
    assert prepared.layers is not None
    prepared.layers.compile()
    assert_gradient_is_that_on_dequantized_weights(prepared, "float32")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_set_up_compiles_layers_whose_gradient_is_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set-up compares the compiled layers with eager mode; both passes of both layers are traced, without Inductor."""
    compiled = DecoderLayers.compile
    monkeypatch.setattr(DecoderLayers, "compile", lambda layers, **_: compiled(layers, "aot_eager"))
    settings = {"layout": "padded", "gradient_checkpointing": "selective"}
    prepared = set_up(llama(tmp_path), "bf16", compile="layers", **settings)
    assert prepared.layers is not None
    assert prepared.layers.is_compiled
    assert_gradient_is_that_on_dequantized_weights(prepared, "bf16")


def test_head_embeddings_and_norms_stay_in_bfloat16(tmp_path: Path) -> None:
    for precision in ("bf16", "bf16-weights"):
        model = set_up(llama(tmp_path), precision).model
        stored = {id(p) for m in model.modules() if isinstance(m, Nf4Linear) for p in m.parameters()}
        others = {n: p.dtype for n, p in model.named_parameters() if not p.requires_grad and id(p) not in stored}
        assert set(others.values()) == {torch.bfloat16}
        assert len(others) == 2 + 5
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("files", ["one file", "shards"])
def test_loaded_weights_are_those_of_the_folder(tmp_path: Path, files: str) -> None:
    name = llama(tmp_path)
    model = LlamaForCausalLM.from_pretrained(name)
    if files == "shards":
        model.save_pretrained(name, max_shard_size="20KB")
        (tmp_path / "model.safetensors").unlink()
    base = load_quantized(config(name), DeviceSpec(CPU, "float32"))
    plain = dict(model.named_parameters())
    for layer_name, layer in base.model.named_modules():
        if isinstance(layer, Nf4Linear):
            expected = Nf4Linear(plain[f"{layer_name}.weight"])
            assert torch.equal(layer.codes, expected.codes)
            assert torch.equal(layer.scales, expected.scales)
    values = base.frozen_values(base.model)
    assert values.keys() == plain.keys()
    assert all(torch.equal(values[name](), plain[name]) for name in plain)
    assert torch.equal(base.model.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_one_unquantized_weight_exists_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []
    largest = [0]
    real = Weights.read_whole

    def watched(self: Weights, name: str) -> Tensor:
        tensor = real(self, name).clone()
        alive.append(weakref.ref(tensor))
        largest[0] = max(largest[0], sum(ref().nbytes for ref in alive if ref() is not None))  # type: ignore[union-attr]
        return tensor

    monkeypatch.setattr(Weights, "read_whole", watched)
    load_quantized(config(llama(tmp_path, torch.bfloat16)), DeviceSpec(CPU, "float32"))
    assert largest[0] <= 2 * 128 * 32 * 2


def test_experts_and_routers_stay_and_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"num_key_value_heads": 1, "num_local_experts": 4, "vocab_size": 64}
    MixtralForCausalLM(MixtralConfig(**SHAPE, **size)).save_pretrained(tmp_path)
    model = load_quantized(config(str(tmp_path)), DeviceSpec(CPU, "float32")).model
    names = [name for name, module in model.named_modules() if isinstance(module, Nf4Linear)]
    assert len(names) == 8
    assert all(".self_attn." in name for name in names)
    note = quantization_note(model)
    assert note.startswith("8 linear layers with 6,144 weights in 4 bits take 3.4 KiB; unquantized, in float32: ")
    assert ", most in layers.mlp.experts.gate_up_proj 192.0 KiB, layers.mlp.experts.down_proj 96.0 KiB, " in note


def test_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=64)).save_pretrained(tmp_path)
    with pytest.raises(InputError) as raised:
        load_quantized(config(str(tmp_path)), DeviceSpec(CPU, "float32"))
    assert str(raised.value) == (
        f"--quantize nf4 is not supported for {tmp_path}: a GPT2LMHeadModel has no linear layers of torch below its "
        "output layer. Leave it out."
    )


def test_tied_head_stays_unquantized(tmp_path: Path) -> None:
    model = load_quantized(config(llama(tmp_path, tie_word_embeddings=True)), DeviceSpec(CPU, "float32")).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(quantized_layers(LlamaForCausalLM.from_pretrained(tmp_path), config("x"))) == 14


def test_counts_are_those_of_the_unquantized_model(tmp_path: Path) -> None:
    name = llama(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(name)
    total = sum(p.numel() for p in plain.parameters())
    for quantize in ("nf4", "nf4-double"):
        model = load_quantized(config(name, quantize=quantize), DeviceSpec(CPU, "float32")).model
        assert count_parameters(model) == (total, 0)
        with torch.device("meta"):
            outline = LlamaForCausalLM(plain.config)
        quantize_outline(outline, config(name, quantize=quantize))
        assert count_parameters(outline)[0] == total
        shapes = {n: (p.shape, p.dtype) for n, p in model.named_parameters()}
        assert {n: (p.shape, p.dtype) for n, p in outline.named_parameters()} == shapes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 0}, "quantize needs lora_rank: weights in 4 bits are not trained, only adapters on them"),
        ({"model": "tiny"}, "quantize is for adapters on a model that exists, not for model tiny: leave it out"),
        (
            {"parallel": "fsdp"},
            "quantize is not supported with parallel fsdp and hsdp, which shard the weights: use ddp",
        ),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        config(**{"model": "x"} | settings)
    assert message in str(raised.value)
