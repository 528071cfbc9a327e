"""Tiny mixtures of experts, samples of uneven length, and the gradient of transformers' own loss on a whole batch."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig

from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.dataset import IGNORED, collate
from bigbatch.lm.data.tokenizer import train_tokenizer
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.setup import ModelSetup, set_up_model
from support.language_models import records

VOCABULARY = 64
LONGEST = 16
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN: dict[str, Any] = {"num_experts": 8, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "qwen2": (Qwen2MoeConfig, {**QWEN, "shared_expert_intermediate_size": 16}),
    "qwen2-sparse": (Qwen2MoeConfig, {**QWEN, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 2}),
    "gpt-oss": (GptOssConfig, {"num_local_experts": 4, "head_dim": 16, "num_experts_per_tok": 2}),
    "qwen3": (Qwen3MoeConfig, {**QWEN, "head_dim": 16}),
    "olmoe": (OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
}


def expert_model(family: str, *, dtype: torch.dtype = torch.float64, coefficient: float = 0.5, **settings: Any) -> Any:
    """Return a model whose random weights route unevenly."""
    config_class, more = FAMILIES[family]
    config = config_class(**{**SHAPE, **more, "router_aux_loss_coef": coefficient, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3)
    return model


def expert_samples(count: int = 22) -> list[dict[str, Tensor]]:
    """Return samples of 3 to 13 tokens; some have no label at their start."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for index in range(count):
        tokens = torch.randint(3, VOCABULARY, (3 + (5 * index) % 11,), generator=generator)
        labels = tokens.roll(-1)
        labels[-1] = IGNORED
        labels[: index % 3] = IGNORED
        samples.append({"input_ids": tokens, "labels": labels})
    return samples


def set_up(model: Any, precision: str = "float64", **settings: Any) -> ModelSetup:
    """Set up a copy of a model as ``bigbatch train`` does, on its device."""
    config = TrainConfig(model="experts", **{"compile": "none", "layout": "padded", **settings}).resolved()
    spec = DeviceSpec(next(model.parameters()).device, precision)
    return set_up_model(copy.deepcopy(model), config, spec, pad_id=0, longest=LONGEST)


def gradients(model: Any) -> dict[str, Tensor]:
    """Return the gradient of each parameter that is trained, zeros where it has none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def whole_batch(
    model: Any, samples: Sequence[dict[str, Tensor]], coefficient: float
) -> tuple[dict[str, Tensor], float]:
    """Return the gradient of cross entropy + coefficient · ``aux_loss`` of transformers, and ``aux_loss``."""
    model = copy.deepcopy(model)
    if next(model.parameters()).dtype == torch.float64:
        model.set_experts_implementation("eager")
    batch = collate(samples, pad_id=0)
    batch = {name: tensor.to(next(model.parameters()).device) for name, tensor in batch.items()}
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    output = model.train()(**tokens, output_router_logits=True, use_cache=False)
    loss = F.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)
    (loss + coefficient * output.aux_loss).backward()
    return gradients(model), float(output.aux_loss.detach())


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return ‖found − expected‖ / ‖expected‖ over all parameters."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[name] - expected[name]).double().norm() ** 2) for name in expected)
    return float((difference / sum(float(tensor.double().norm() ** 2) for tensor in expected.values())) ** 0.5)


def save_expert_folder(folder: Path, family: str = "mixtral", *, coefficient: float = 0.5, **settings: Any) -> Path:
    """Save a model and its tokenizer, for the commands."""
    tokenizer = train_tokenizer([row["completion"] for row in records(50)], vocabulary_size=300)
    model = expert_model(
        family, dtype=torch.float32, coefficient=coefficient, vocab_size=len(tokenizer) + 8, hidden_size=16, **settings
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
