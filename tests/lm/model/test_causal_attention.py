"""Attention without a mask: the same numbers as with it, the same text, and nothing of it in what is saved."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.adapters import add_lora
from bigbatch.lm.model.causal_attention import (
    NAME,
    drop_mask_if_causal,
    has_full_attention,
    looks_causal,
    use_causal_attention,
)
from bigbatch.lm.model.decoder_layers import DecoderLayers
from bigbatch.lm.model.pretrained import load_model
from support.language_models import records, run, save_model_folder, write_jsonl

CPU = torch.device("cpu")
LENGTH = 20
WIDE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 300,
    "max_position_embeddings": 64,
}  # fmt: skip
KINDS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**WIDE),
    "gpt2": lambda: GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=300, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "qwen2": lambda: Qwen2Config(**WIDE, num_key_value_heads=1),
    "mistral": lambda: MistralConfig(**WIDE, num_key_value_heads=1, sliding_window=LENGTH),
    "mistral with a short window": lambda: MistralConfig(**WIDE, num_key_value_heads=1, sliding_window=LENGTH - 1),
    "gemma2": lambda: Gemma2Config(**WIDE, num_key_value_heads=1, head_dim=8, sliding_window=16),
    "bloom": lambda: BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=300),
    "bert": lambda: BertConfig(**WIDE),
}
SWAPPED = ("llama", "gpt2", "qwen2", "mistral")


def build(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[kind](), dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)  # attention that matters
    return model


def rows(number: int = 2) -> Tensor:
    return torch.arange(number * LENGTH).reshape(number, LENGTH) * 7 % 290 + 5


def gradients(model: Any, **inputs: Tensor) -> list[Tensor]:
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    logits[0, :12].logsumexp(-1).sum().add(logits[1].logsumexp(-1).sum()).backward()  # the first row is padded after 12
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_original_attention(kind: str) -> None:
    model = build(kind)
    padded = torch.ones_like(rows())
    padded[0, 12:] = 0
    expected = model(input_ids=rows(), use_cache=False).logits
    masked = gradients(model, input_ids=rows(), attention_mask=padded)
    left_out = drop_mask_if_causal(model, DeviceSpec(CPU, "float64"), max_length=LENGTH)
    assert left_out == (kind != "bert")
    assert (model.config._attn_implementation == NAME) == (kind in SWAPPED)
    assert torch.allclose(model(input_ids=rows(), use_cache=False).logits, expected, rtol=0, atol=1e-12)
    if left_out:
        found = gradients(model, input_ids=rows())
        within = 1e-5 if kind in ("gemma2", "bloom") else 1e-12  # whose softmax is in float32
        assert all(torch.allclose(a, b, rtol=0, atol=within) for a, b in zip(found, masked, strict=True))


@pytest.mark.parametrize("kind", SWAPPED)
def test_generated_text_equals_original_attention(kind: str) -> None:
    model = build(kind)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    before = model.generate(rows(1)[:, :5], **options)
    assert drop_mask_if_causal(model, DeviceSpec(CPU, "float64"), max_length=LENGTH)
    assert torch.equal(model.generate(rows(1)[:, :5], **options), before)
    assert torch.equal(model.generate(rows(1)[:, :5], **options, use_cache=False), before)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_and_checkpointing_are_supported(kind: str) -> None:
    plain, swapped = build(kind), build(kind)
    drop_mask_if_causal(swapped, DeviceSpec(CPU, "float64"), max_length=LENGTH)
    plain, swapped = (add_lora(model, rank=2, alpha=4.0, seed=0).train() for model in (plain, swapped))
    DecoderLayers(swapped).set_checkpointing("full")
    for model in (plain, swapped):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
    assert swapped.config._attn_implementation == NAME
    found, expected = (gradients(model, input_ids=rows()) for model in (swapped, plain))
    assert len(found) > 0
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_weightless_check_agrees_with_trial(kind: str) -> None:
    model = build(kind)
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(KINDS[kind]())
    assert looks_causal(bare) == drop_mask_if_causal(model, DeviceSpec(CPU, "float64"), max_length=LENGTH)
    if looks_causal(bare):
        assert has_full_attention(bare.config, max_length=LENGTH) == (model.config._attn_implementation == NAME)


def test_sliding_window_shorter_than_rows_keeps_mask() -> None:
    config = build("mistral").config
    assert has_full_attention(config, max_length=LENGTH)
    assert not has_full_attention(config, max_length=LENGTH + 1)
    assert not has_full_attention(build("gemma2").config, max_length=16)  # eager: it caps what attention adds up


def test_model_with_non_causal_mask_keeps_it() -> None:
    """Alibi, as some models have it: the distance is in the mask."""

    class Biased(type(build("llama"))):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
            length = input_ids.shape[1]
            bias = torch.arange(length).sub(length).double().expand(len(input_ids), 1, length, length)
            causal = bias.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            return super().forward(input_ids=input_ids, attention_mask=causal, **options)

    torch.manual_seed(0)
    model = Biased(KINDS["llama"]()).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    expected = model(input_ids=rows(), use_cache=False).logits
    assert drop_mask_if_causal(model, DeviceSpec(CPU, "float64"), max_length=LENGTH)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(input_ids=rows(), use_cache=False).logits, expected)
    use_causal_attention(model)
    assert not torch.allclose(model(input_ids=rows(), use_cache=False).logits, expected, atol=1e-3)


@pytest.mark.slow
def test_saved_model_is_unaffected_and_loads_elsewhere(tmp_path: Path) -> None:
    data = str(write_jsonl(tmp_path / "data.jsonl", records(20)))
    base = str(save_model_folder(tmp_path / "base"))
    prepared, _, _ = run(tmp_path / "run", data=data, model=base, steps=1, global_batch=4, microbatch=2)
    assert prepared.model.config._attn_implementation == NAME
    saved = tmp_path / "run" / "model"
    assert all("bigbatch" not in path.read_text(encoding="utf-8") for path in saved.glob("*.json"))
    script = f"""
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(saved)!r})
assert not any(name.partition(".")[0] == "bigbatch" for name in sys.modules)
logits = model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, -1, :4]
print(json.dumps([model.config._attn_implementation, *logits.tolist()]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    kind, *logits = json.loads(done.stdout.splitlines()[-1])
    assert kind == "sdpa"
    with torch.no_grad():
        expected = prepared.model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, -1, :4]
    assert logits == pytest.approx(expected.tolist(), abs=1e-6)
    assert load_model(str(saved), dtype=torch.float32).config._attn_implementation == "sdpa"
