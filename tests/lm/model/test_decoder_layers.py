"""Layers that are compiled or computed anew: the same gradients, less memory, one graph for all lengths."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
)

from bigbatch.autotune.peak_prediction import prediction_obstacle
from bigbatch.gradients.gradient_sums import GradientSums
from bigbatch.lm.config.field_types import AUTO_MODES, CHECKPOINTING_MODES, CheckpointingMode
from bigbatch.lm.data.dataset import collate
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.adapters import add_lora
from bigbatch.lm.model.causal_attention import use_causal_attention
from bigbatch.lm.model.causal_lm_loss import CausalLMLoss
from bigbatch.lm.model.decoder_layers import DecoderLayers
from bigbatch.lm.model.packed_rows import pack_row
from bigbatch.memory.allocation_tracker import AllocationTracker
from support.tiers import slow_except

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch hides it
CPU = torch.device("cpu")
DOUBLE = DeviceSpec(CPU, "float64")
EXACT = 1e-12
LONGEST = 16
DEPTH = 4
SIZE = {
    "hidden_size": 16, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": 32,
    "vocab_size": 100, "max_position_embeddings": 256,
}  # fmt: skip
GPT2_SIZE = {"n_embd": 16, "n_layer": DEPTH, "n_head": 2, "n_positions": 256, "vocab_size": 100}
KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZE),
    "qwen2": lambda: Qwen2Config(**SIZE, num_key_value_heads=1),
    "mistral": lambda: MistralConfig(**SIZE, num_key_value_heads=1, sliding_window=5),
    "gpt2": lambda: GPT2Config(**GPT2_SIZE, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def build(config: Any, *, lora: bool = False) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).train()
    use_causal_attention(model)
    return add_lora(model, rank=2, alpha=4.0, seed=0).train() if lora else model


def samples(*lengths: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = [torch.randint(100, (length,), generator=generator) for length in lengths]
    return [{"input_ids": row, "labels": row.roll(-1)} for row in tokens]


def padded(*lengths: int) -> dict[str, Tensor]:
    return collate(samples(*lengths), pad_id=0)


def packed(*lengths: int) -> dict[str, Tensor]:
    return pack_row(samples(*lengths), pad_id=0, longest=LONGEST)


def gradient(model: Any, microbatch: dict[str, Tensor]) -> Tensor:
    """By all that is trained, with the same random numbers each time."""
    torch.manual_seed(1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss_sum, _ = CausalLMLoss(DOUBLE, needs_mask=False, longest=LONGEST)(model, microbatch)
    return torch.cat([found.flatten() for found in torch.autograd.grad(loss_sum, trained)])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


# computed anew ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", slow_except(KINDS, "llama", "gpt2"))
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapters"])
def test_recomputed_layers_have_same_gradient(kind: str, lora: bool) -> None:
    model = build(KINDS[kind](), lora=lora)
    for microbatch in (padded(5, 9, 16), packed(5, 9, 16)):
        expected = gradient(model, microbatch)
        layers = DecoderLayers(model)
        assert layers.mode == "none"
        for level in (*CHECKPOINTING_MODES, *CHECKPOINTING_MODES[::-1]):
            layers.set_checkpointing(level)
            assert layers.mode == level
            assert error(gradient(model, microbatch), expected) <= EXACT


@pytest.mark.parametrize("compiled", [False, True], ids=["interpreted", "compiled"])
def test_each_level_recomputes_expected_layers(compiled: bool) -> None:
    model = build(KINDS["llama"]())
    calls: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    layers = DecoderLayers(model)
    if compiled:
        layers.compile("eager")
    for level, again in (("none", []), ("selective", [0, 2]), ("full", [0, 1, 2, 3]), ("offload", [0, 1, 2, 3])):
        layers.set_checkpointing(level)
        with torch._dynamo.config.patch(disable=True):
            calls.clear()
            gradient(model, packed(5, 9))
        assert sorted(calls) == sorted([*range(DEPTH), *again])


def peak_of(model: Any) -> int:
    microbatch = packed(*[16] * 12)
    with AllocationTracker(CPU) as tracker:
        gradient(model, microbatch)
    return tracker.peak_bytes


def test_each_level_uses_less_memory() -> None:
    model = build(LlamaConfig(**SIZE | {"hidden_size": 64, "intermediate_size": 256}))
    layers = DecoderLayers(model)
    peaks = []
    for level in AUTO_MODES:
        layers.set_checkpointing(level)
        peaks.append(peak_of(model))
    none, selective, full = peaks
    assert none > selective > full
    assert selective < (none + full) / 2 * 1.1, "about half of what all layers would save"
    layers.set_checkpointing("none")
    assert peak_of(model) == none


DROPPING: dict[str, Callable[[], Any]] = {
    "a module": lambda: GPT2Config(**GPT2_SIZE, resid_pdrop=0.5, embd_pdrop=0, attn_pdrop=0),
    "a number in attention": lambda: LlamaConfig(**SIZE, attention_dropout=0.5),
    "none": lambda: LlamaConfig(**SIZE),
}


@pytest.mark.parametrize("where", slow_except(DROPPING, "a number in attention"))
def test_dropout_is_reproduced_in_recomputed_compiled_layers(where: str) -> None:
    model = build(DROPPING[where]())
    microbatch = padded(5, 9, 13)
    expected = gradient(model, microbatch)
    assert (error(gradient(model.eval(), microbatch), expected) > 1e-2) == (where != "none")
    model.train()
    layers = DecoderLayers(model)
    layers.compile("eager")
    for level in CHECKPOINTING_MODES:
        layers.set_checkpointing(level)
        assert error(gradient(model, microbatch), expected) <= EXACT


# compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", slow_except(KINDS, "llama"))
def test_one_graph_serves_all_layers_and_lengths(kind: str) -> None:
    model = build(KINDS[kind]())
    microbatches = [padded(5, 9, 13), padded(*[14] * 9), padded(7, 6), padded(*[11] * 30), padded(15, 1)]
    expected = [gradient(model, microbatch) for microbatch in microbatches]
    layers = DecoderLayers(model)
    layers.compile("eager")
    assert layers.is_compiled
    assert graphs() == 0, "compiled when it runs"
    for level in CHECKPOINTING_MODES:
        layers.set_checkpointing(level)
        for microbatch, gradients in zip(microbatches, expected, strict=True):
            assert error(gradient(model, microbatch), gradients) <= EXACT
            assert graphs() == 1


@pytest.mark.slow
def test_packed_rows_can_be_compiled_on_cpu() -> None:
    """There a layer breaks at its sequences, which are one call each."""
    model = build(KINDS["llama"]())
    microbatches = [packed(5, 9, 13), packed(*[14] * 9)]
    expected = [gradient(model, microbatch) for microbatch in microbatches]
    layers = DecoderLayers(model)
    layers.compile("eager")
    layers.set_checkpointing("selective")
    for microbatch, gradients in zip(microbatches, expected, strict=True):
        assert error(gradient(model, microbatch), gradients) <= EXACT


def test_backward_can_be_traced() -> None:
    """As the backend that is the default does."""
    model = build(LlamaConfig(**SIZE | {"num_hidden_layers": 1}))
    layers = DecoderLayers(model)
    microbatches = [padded(5, 9, 13), padded(4, 4, 4, 7)]
    expected = [gradient(model, microbatch) for microbatch in microbatches]
    layers.compile("aot_eager")
    for level in ("none", "full"):
        layers.set_checkpointing(level)
        for microbatch, gradients in zip(microbatches, expected, strict=True):
            assert error(gradient(model, microbatch), gradients) <= EXACT
    assert graphs() == 1


def test_compiled_layers_leave_checkpointing_to_their_calls() -> None:
    model = build(KINDS["llama"]())
    layers = DecoderLayers(model)
    layers.compile("eager")
    for level in (*CHECKPOINTING_MODES, "none"):
        layers.set_checkpointing(level)
        assert [layer.gradient_checkpointing for layer in model.model.layers] == [False] * DEPTH
    layers.set_checkpointing("selective")
    layers.decompile()
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False, True, False]


def test_paused_layers_run_uncompiled_and_return() -> None:
    model = build(KINDS["llama"]())
    expected = gradient(model, padded(5, 9))
    layers = DecoderLayers(model)
    layers.compile("eager")
    layers.set_checkpointing("selective")
    gradient(model, padded(5, 9))
    compiled, calls = graphs(), [layer._compiled_call_impl for layer in model.model.layers]
    assert all(calls)
    torch._dynamo.reset()
    with layers.eager():
        assert layers.is_compiled
        assert not any(layer._compiled_call_impl for layer in model.model.layers)
        assert error(gradient(model, padded(5, 9)), expected) <= EXACT
        assert graphs() == compiled, "nothing was compiled anew, although nothing is remembered"
    assert [layer._compiled_call_impl for layer in model.model.layers] == calls
    gradient(model, padded(5, 9))
    assert graphs() > compiled


def test_layers_return_after_failing_pause() -> None:
    model = build(KINDS["llama"]())
    layers = DecoderLayers(model)
    layers.compile("eager")
    calls = [layer._compiled_call_impl for layer in model.model.layers]

    def fail() -> None:
        with layers.eager():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [layer._compiled_call_impl for layer in model.model.layers] == calls


def test_pause_without_compilation_changes_nothing() -> None:
    model = build(KINDS["llama"]())
    layers = DecoderLayers(model)
    with layers.eager():
        assert not any(layer._compiled_call_impl for layer in model.model.layers)
    assert not layers.is_compiled


def test_eager_layers_equal_original() -> None:
    model = build(KINDS["llama"]())
    expected = gradient(model, padded(5, 9))
    layers = DecoderLayers(model)
    assert prediction_obstacle(model) is None
    layers.compile("eager")
    assert prediction_obstacle(model) == "it is compiled, so the saved activations are known only when it runs"
    layers.decompile()
    assert not layers.is_compiled
    assert prediction_obstacle(model) is None
    assert torch.equal(gradient(model, padded(5, 9)), expected)
    assert graphs() == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_text_is_generated_without_compiling(kind: str) -> None:
    model = build(KINDS[kind]())
    prompt = torch.arange(5)[None] + 3
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.eval().generate(prompt, **options)
    layers = DecoderLayers(model)
    layers.compile("eager")
    layers.set_checkpointing("full")
    gradient(model.train(), padded(5, 9))
    compiled = graphs()
    with layers.eager():
        assert torch.equal(model.eval().generate(prompt, **options), expected)
    assert graphs() == compiled


# models ----------------------------------------------------------------------------------------------------------


def test_adapters_are_inside_layers() -> None:
    model = build(KINDS["llama"](), lora=True)
    layers = DecoderLayers(model)
    layers.set_checkpointing("full")
    assert all(layer.gradient_checkpointing for layer in model.get_base_model().model.layers)


@pytest.mark.parametrize("level", CHECKPOINTING_MODES)
def test_gradients_reach_trained_parameters_only(level: CheckpointingMode) -> None:
    """Not in the embedded tokens, which transformers lets require them: one more layer to differentiate."""
    model = build(KINDS["llama"](), lora=True)
    DecoderLayers(model).set_checkpointing(level)
    assert not any(module._forward_hooks for module in model.modules())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss_sum, _ = CausalLMLoss(DOUBLE, needs_mask=False, longest=LONGEST)(model, packed(5, 9))
    with GradientSums(parameters) as sums:
        sums.backward(loss_sum)
        assert sums.can_name_leaves


def test_saved_model_is_unaffected() -> None:
    model = build(KINDS["llama"]())
    before = list(model.state_dict())
    DecoderLayers(model).compile("eager")
    assert list(model.state_dict()) == before


def test_model_without_decoder_layers_is_rejected() -> None:
    class Plain(nn.Module):
        def gradient_checkpointing_enable(self, **_: Any) -> None: ...

    with pytest.raises(ValueError, match="it has no layers that transformers can checkpoint"):
        DecoderLayers(Plain())


def test_uncheckpointable_model_is_rejected_with_transformers_error() -> None:
    model = build(KINDS["llama"]())
    model.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not support .* checkpointing"):
        DecoderLayers(model)


def test_router_noise_counts_as_random() -> None:
    quiet, noisy = (
        DecoderLayers(
            build(MixtralConfig(**SIZE, num_key_value_heads=1, num_local_experts=2, router_jitter_noise=noise))
        )
        for noise in (0.0, 0.1)
    )
    assert (quiet._uses_randomness, noisy._uses_randomness) == (False, True)


def test_scaling_of_adapters_is_a_constant_of_the_graph() -> None:
    model = build(LlamaConfig(**SIZE), lora=True).train()
    inputs: list[Any] = []

    def backend(graph: Any, examples: list[Any]) -> Any:
        inputs.extend(examples)
        return graph.forward

    layers = DecoderLayers(model)
    layers.compile(backend)
    for length in (8, 12, 5):
        model(input_ids=torch.arange(2 * length).view(2, length)).logits.sum().backward()
    assert counters["stats"]["unique_graphs"] <= 4  # as many as with floats as inputs
    assert inputs
    assert not [each for each in inputs if isinstance(each, float | torch.SymFloat)]
    assert not [each for each in inputs if isinstance(each, Tensor) and each.ndim == 0]
    assert torch._dynamo.config.specialize_float is False
