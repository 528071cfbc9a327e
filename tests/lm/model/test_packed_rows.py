"""Packed rows: what is in them, the same loss and gradients as one by one, and which models cannot have them."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    RecurrentGemmaConfig,
)
from transformers.models.llama import modeling_llama

from bigbatch.batching.token_groups import round_up_row
from bigbatch.lm.config.field_types import CHECKPOINTING_MODES
from bigbatch.lm.data.dataset import IGNORED, collate
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.adapters import add_lora
from bigbatch.lm.model.causal_attention import NAME, use_causal_attention
from bigbatch.lm.model.causal_lm_loss import CausalLMLoss
from bigbatch.lm.model.chunked_loss import ChunkedCausalLMLoss
from bigbatch.lm.model.decoder_layers import DecoderLayers
from bigbatch.lm.model.packed_rows import MIN_ROW_PLACES, model_inputs, pack_row, packing_obstacle

CPU = torch.device("cpu")
DOUBLE = DeviceSpec(CPU, "float64")
EXACT = 1e-12
PAD = 7
VOCABULARY = 300
LONGEST = 24
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
WIDE = SIZE | {"intermediate_size": 32, "max_position_embeddings": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
PACKED: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**WIDE),
    "qwen2 with grouped heads": lambda: Qwen2Config(**WIDE, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        n_embd=16, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCABULARY, **NO_DROPOUT
    ),
    "mistral with a short window": lambda: MistralConfig(**WIDE, num_key_value_heads=1, sliding_window=5),
    "gemma3 with a window in some layers": lambda: Gemma3TextConfig(
        **WIDE, num_key_value_heads=1, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
}  # fmt: skip
IN_FLOAT32 = ("gemma3 with a window in some layers",)  # whose norm is computed in it, whatever the rest is in


def build(config: Any, *, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.ndim > 1 else 1)  # attention that matters
    return model


def samples(*lengths: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Tokens whose next ones are learned, every fourth not."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        tokens = torch.randint(VOCABULARY, (length + 1,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.25, IGNORED, tokens[1:])
        made.append({"input_ids": tokens[:-1], "labels": labels})
    return made


LENGTHS = (LONGEST, 1, 9, 17, 6, 2)


# rows ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=90),
    longer=st.integers(0, 50),
    most=st.one_of(st.none(), st.integers(1, 2500)),
)
def test_row_holds_samples_and_padding_as_separate_sequences(lengths: list[int], longer: int, most: int | None) -> None:
    given_samples = samples(*lengths)
    longest, tokens = max(lengths) + longer, sum(lengths)
    row = pack_row(given_samples, pad_id=PAD, longest=longest, most=most)
    assert {name: (tensor.dtype, tensor.ndim) for name, tensor in row.items()} == {
        "input_ids": (torch.int64, 2), "labels": (torch.int64, 2), "position_ids": (torch.int64, 2),
        "offsets": (torch.int32, 1),
    }  # fmt: skip
    size = row["input_ids"].shape[1]
    assert all(row[name].shape == (1, size) for name in ("labels", "position_ids"))
    assert (
        size == round_up_row(tokens) if most is None else tokens <= size <= max(tokens, min(round_up_row(tokens), most))
    )

    offsets = row["offsets"].tolist()
    places = len(offsets) - 1
    assert places >= MIN_ROW_PLACES
    assert places & (places - 1) == 0
    assert (offsets[0], offsets[-1]) == (0, size)
    found = [end - start for start, end in pairwise(offsets)]
    filled = [length for length in found if length]
    assert found == filled + [0] * (places - len(filled)), "empty sequences stand at the end"
    assert filled[: len(lengths)] == lengths
    assert max(filled) <= longest
    assert len(filled) <= places < 2 * max(MIN_ROW_PLACES, len(filled))

    positions = torch.cat([torch.arange(length) for length in filled])
    assert torch.equal(row["position_ids"][0], positions)
    for name, filling in (("input_ids", PAD), ("labels", IGNORED)):
        parts = row[name][0].split([*lengths, size - tokens])
        assert all(torch.equal(part, sample[name]) for part, sample in zip(parts[:-1], given_samples, strict=True))
        assert (parts[-1] == filling).all()


def test_row_marks_its_padding_on_request() -> None:
    row = pack_row(samples(40, 30), pad_id=PAD, longest=64, marks_padding=True)
    mask = row["attention_mask"]
    assert (mask.dtype, mask.shape) == (torch.int64, row["input_ids"].shape)
    assert mask[0].tolist() == [1] * 70 + [0] * (mask.shape[1] - 70)


@pytest.mark.parametrize(("sequences", "places"), [(1, 64), (64, 64), (65, 128), (128, 128), (129, 256)])
def test_offset_slots_are_a_power_of_two(sequences: int, places: int) -> None:
    row = pack_row(samples(*[64] * sequences), pad_id=PAD, longest=64, most=64 * sequences)
    assert len(row["offsets"]) == places + 1
    assert row["offsets"].unique().numel() == sequences + 1


def test_row_respects_limit_where_samples_do() -> None:
    sizes = [
        pack_row(samples(600, 500), pad_id=PAD, longest=600, most=most)["input_ids"].shape[1]
        for most in (None, 5000, 1152, 1120, 1100, 700)
    ]
    assert sizes == [1152, 1152, 1152, 1120, 1100, 1100]


def test_no_samples_give_no_row() -> None:
    with pytest.raises(ValueError, match=r"there is no sample to pack\. Pass at least one\."):
        pack_row([], pad_id=PAD, longest=8)


def test_model_receives_offsets_or_mask() -> None:
    packed, padded = pack_row(samples(4, 2), pad_id=PAD, longest=9), collate(samples(4, 2), pad_id=PAD)
    inputs = model_inputs(packed, longest=9, needs_mask=True)
    assert inputs.pop("cu_seq_lens_q") is inputs.pop("cu_seq_lens_k") is packed["offsets"]
    assert inputs.pop("max_length_q") == inputs.pop("max_length_k") == 9
    assert inputs == {name: packed[name] for name in ("input_ids", "position_ids")}
    assert model_inputs(padded, longest=9, needs_mask=True).keys() == {"input_ids", "attention_mask"}
    assert model_inputs(padded, longest=9, needs_mask=False).keys() == {"input_ids"}


# the same loss and gradients -------------------------------------------------------------------------------------


def outcome(model: Any, loss_fn: Any, microbatches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """The sum and its gradient by all that is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss_sum = sum(loss_fn(model, microbatch)[0] for microbatch in microbatches)
    found = torch.autograd.grad(loss_sum, trained, allow_unused=True, materialize_grads=True)
    return loss_sum.detach(), torch.cat([gradient.flatten() for gradient in found])


def one_by_one(model: Any, given_samples: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """The oracle: each sequence alone, with transformers' own attention and its mask."""
    return outcome(model, CausalLMLoss(DOUBLE), [collate([sample], pad_id=PAD) for sample in given_samples])


def difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def rows_of(given_samples: list[dict[str, Tensor]], *cuts: int) -> list[dict[str, Tensor]]:
    starts = (0, *cuts, len(given_samples))
    parts = [given_samples[start:end] for start, end in pairwise(starts)]
    return [pack_row(part, pad_id=PAD, longest=LONGEST) for part in parts]


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("loss", [CausalLMLoss, ChunkedCausalLMLoss])
def test_packed_loss_equals_each_sequence_alone(kind: str, loss: Any) -> None:
    model = build(PACKED[kind]())
    expected = one_by_one(model, samples(*LENGTHS))
    use_causal_attention(model)
    loss_fn = loss(DOUBLE, needs_mask=False, longest=LONGEST)
    within = 1e-5 if kind in IN_FLOAT32 else EXACT
    for cuts in ((), (1, 4)):
        assert difference(outcome(model, loss_fn, rows_of(samples(*LENGTHS), *cuts)), expected) <= within
    padded = [collate(samples(*LENGTHS), pad_id=PAD)]
    assert difference(outcome(model, loss_fn, padded), expected) <= within


@pytest.mark.parametrize("kind", PACKED)
def test_row_without_offsets_changes_loss(kind: str) -> None:
    """The bound above must notice sequences that see one another, and positions that do not begin anew."""
    model = build(PACKED[kind]())
    expected = one_by_one(model, samples(*LENGTHS))
    use_causal_attention(model)
    (row,) = rows_of(samples(*LENGTHS))
    size = row["input_ids"].shape[1]
    apart = outcome(model, CausalLMLoss(DOUBLE, longest=LONGEST), [row])
    broken = row | {"offsets": torch.tensor([0, size], dtype=torch.int32)}
    assert difference(outcome(model, CausalLMLoss(DOUBLE, longest=size), [broken]), expected) > 1e-3
    broken = row | {"position_ids": torch.arange(size)[None].clamp(max=63)}
    positions = difference(outcome(model, CausalLMLoss(DOUBLE, longest=LONGEST), [broken]), apart)
    assert (positions > 1e-3) == (kind == "gpt2"), "rotary positions are relative within a sequence"


def test_omitted_sliding_window_changes_loss() -> None:
    model = build(PACKED["mistral with a short window"]())
    expected = one_by_one(model, samples(*LENGTHS))
    use_causal_attention(model)
    model.config.sliding_window = None
    loss_fn = CausalLMLoss(DOUBLE, needs_mask=False, longest=LONGEST)
    assert difference(outcome(model, loss_fn, rows_of(samples(*LENGTHS))), expected) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral with a short window"])
@pytest.mark.parametrize("level", CHECKPOINTING_MODES)
def test_adapters_and_recomputation_are_supported(kind: str, level: Any) -> None:
    def adapted(model: Any) -> Any:
        model = add_lora(model, rank=2, alpha=4.0, seed=0).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        return model

    expected = one_by_one(adapted(build(PACKED[kind]())), samples(*LENGTHS))
    model = build(PACKED[kind]())
    use_causal_attention(model)
    model = adapted(model)
    DecoderLayers(model).set_checkpointing(level)
    loss_fn = CausalLMLoss(DOUBLE, needs_mask=False, longest=LONGEST)
    assert difference(outcome(model, loss_fn, rows_of(samples(*LENGTHS), 3)), expected) <= EXACT


@pytest.mark.parametrize("kind", PACKED)
def test_sequences_do_not_influence_each_other(kind: str) -> None:
    """To the bit: neither the logits of another nor its share of the gradient change."""
    model = build(PACKED[kind]())
    use_causal_attention(model)
    given_samples = samples(*LENGTHS)
    lengths = [*LENGTHS, round_up_row(sum(LENGTHS)) - sum(LENGTHS)]
    for changed in range(len(LENGTHS)):
        other = samples(*LENGTHS, seed=1)[changed]
        outcomes = []
        for sample in (given_samples[changed], other):
            (row,) = rows_of([*given_samples[:changed], sample, *given_samples[changed + 1 :]])
            logits = model(**model_inputs(row, longest=LONGEST, needs_mask=False), use_cache=False).logits[0]
            outcomes.append(logits.split(lengths))
        for index, (before, after) in enumerate(zip(*outcomes, strict=True)):
            assert torch.equal(before, after) == (index != changed)

    embedded = model.get_input_embeddings()(row["input_ids"]).detach().requires_grad_()
    inputs = model_inputs(row, longest=LONGEST, needs_mask=False)
    del inputs["input_ids"]
    by_sequence = model(inputs_embeds=embedded, **inputs, use_cache=False).logits[0].split(lengths)
    for index, logits in enumerate(by_sequence[:-1]):
        (gradient,) = torch.autograd.grad(logits.square().sum(), embedded, retain_graph=True)
        reached = [bool(part.any()) for part in gradient[0].split(lengths)]
        assert reached == [other == index for other in range(len(lengths))]


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8), most=st.integers(1, 80), seed=st.integers(0, 9))
def test_any_lengths_can_share_a_row(lengths: list[int], most: int, seed: int) -> None:
    model = build(PACKED["qwen2 with grouped heads"]())
    given_samples = [sample for sample in samples(*lengths, seed=seed) if (sample["labels"] != IGNORED).any()]
    if not given_samples:
        return
    expected = one_by_one(model, given_samples)
    use_causal_attention(model)
    loss_fn = CausalLMLoss(DOUBLE, needs_mask=False, longest=12)
    row = pack_row(given_samples, pad_id=PAD, longest=12, most=most)
    assert difference(outcome(model, loss_fn, [row]), expected) <= EXACT


# which models can ------------------------------------------------------------------------------------------------


def reason(
    config: Any, *, precision: str = "float64", device: torch.device = CPU, longest: int = 64, scale: float = 3.0
) -> str | None:
    machine = DeviceSpec(device, precision)
    model = build(config, dtype=machine.weights_dtype, scale=scale)
    use_causal_attention(model)
    return packing_obstacle(model, machine, longest=longest)


@pytest.mark.parametrize("precision", ["float64", "float32", "bf16", "bf16-weights"])
@pytest.mark.parametrize("kind", PACKED)
def test_models_that_pass_attention_arguments_are_supported(kind: str, precision: str) -> None:
    assert reason(PACKED[kind](), precision=precision) is None


HYBRID = SIZE | {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
SEEN = "sequences in a packed row affect one another"
OWN = "the model uses its own attention implementation"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "mamba": (lambda: MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=VOCABULARY, state_size=4), SEEN),
    "a convolution in every other layer": (
        lambda: Lfm2Config(**HYBRID, layer_types=["conv", "full_attention"], block_multiple_of=8), SEEN,
    ),
    "a recurrence": (
        lambda: RecurrentGemmaConfig(**HYBRID | {"num_hidden_layers": 3}, lru_width=16, attention_window_size=8), SEEN,
    ),
    "alibi": (lambda: BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=VOCABULARY), OWN),
    "attention of its own": (
        lambda: GPTJConfig(n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=VOCABULARY, rotary_dim=4), OWN,
    ),
    "softcap": (
        lambda: Gemma2Config(**WIDE, num_key_value_heads=1, head_dim=8),
        "attention with softcap is not supported for packed rows",
    ),
    "sinks": (
        lambda: GptOssConfig(**HYBRID, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
        "attention with s_aux is not supported for packed rows",
    ),
    "chunks": (
        lambda: Llama4TextConfig(
            **WIDE, num_key_value_heads=1, head_dim=8, attention_chunk_size=4, num_local_experts=2,
            intermediate_size_mlp=32,
        ),
        "the model uses chunked attention",
    ),
    "a window in the mask alone": (
        lambda: LlamaConfig(**WIDE, sliding_window=4), "its sliding window exists only as a mask",
    ),
    "too few tokens": (
        lambda: LlamaConfig(**WIDE | {"vocab_size": 16}), "the model has too few tokens or positions to test it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_unsupported_models_are_reported_with_reason(kind: str) -> None:
    config, expected = REFUSED[kind]
    assert reason(config()) == expected


@pytest.mark.parametrize("precision", ["float32", "bf16", "bf16-weights"])
@pytest.mark.parametrize("width", [16, 64])
def test_leak_hidden_by_rounding_is_found(precision: str, width: int) -> None:
    """With weights as they begin, three tokens of convolution move the logits by less than bfloat16 does."""
    config = Lfm2Config(**HYBRID | {"hidden_size": width}, layer_types=["conv", "full_attention"], block_multiple_of=8)
    assert reason(config, precision=precision, scale=1.0) == SEEN


def test_window_as_long_as_sequences_is_ignored() -> None:
    assert reason(LlamaConfig(**WIDE, sliding_window=20), longest=20) is None
    assert reason(LlamaConfig(**WIDE, sliding_window=20), longest=21) == "its sliding window exists only as a mask"
    assert reason(LlamaConfig(**WIDE, sliding_window=0)) is None  # what some configurations say for none


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        ("cuda", "float32", "attention has no kernel for packed rows in float32"),
        ("cuda", "float64", "attention has no kernel for packed rows in float64"),
        ("mps", "float32", "attention has no kernel for packed rows on mps"),
    ],
)
def test_device_without_kernel_is_named_before_running(device: str, precision: str, expected: str) -> None:
    model = build(PACKED["llama"]())
    assert packing_obstacle(model, DeviceSpec(torch.device(device), precision), longest=8) == expected


def test_differing_logits_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that ignores positions counts them itself, across sequences."""

    class Counting(modeling_llama.LlamaRotaryEmbedding):
        def forward(self, x: Tensor, position_ids: Tensor) -> Any:
            positions = torch.arange(x.shape[1])[None] ** 2  # not linear: rotary positions are relative otherwise
            return super().forward(x, positions.expand_as(position_ids))

    monkeypatch.setattr(modeling_llama, "LlamaRotaryEmbedding", Counting)
    said = reason(PACKED["llama"]())
    assert said is not None
    assert said.startswith("its logits in a packed row differ by ")


def test_trial_leaves_model_and_random_state_unchanged() -> None:
    model = build(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=VOCABULARY))
    use_causal_attention(model)
    model.eval()
    model.transformer.h[0].train()
    modes = [module.training for module in model.modules()]
    random_state, attend = torch.get_rng_state(), AttentionInterface()[NAME]
    assert packing_obstacle(model, DOUBLE, longest=64) is None
    assert AttentionInterface()[NAME] is attend, "is not watched any more"
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert model.config._attn_implementation == NAME


def test_failed_trial_restores_random_state() -> None:
    model = build(REFUSED["softcap"][0]())
    use_causal_attention(model)
    random_state = torch.get_rng_state()
    assert packing_obstacle(model, DOUBLE, longest=64) == REFUSED["softcap"][1]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("positions", "expected"), [(2, None), (1, "the model has too few tokens or positions")])
def test_short_sequences_are_tried_at_their_length(positions: int, expected: str | None) -> None:
    said = reason(LlamaConfig(**WIDE | {"max_position_embeddings": positions}), longest=positions)
    assert said == expected or (expected is not None and said is not None and said.startswith(expected))
