"""Floating-point operations of an update, and the rate of large matrix products on known cards.

    6 · tokens · trained weights + 4 · tokens · frozen weights + 12 · layers · width · Σ length · (length + 1) / 2

Weights are those of matrix products: norms, biases and an embedding that is not the head as well are left out. A frozen
weight needs no gradient, which saves a third. Attention is causal within documents; whatever a tool computes in
addition, such as recomputed activations, padding and attention across documents, does not count.
"""

from collections.abc import Sequence
from typing import Any

import torch

from bigbatch.lm.bench.workload import Sample

MATRIX_FLOPS_PER_S = {"NVIDIA H100 80GB HBM3": 790e12, "NVIDIA H200": 790e12}
"""Rate of bf16 products of 8,192 × 8,192 matrices with random values, measured on the card (H200: 788 TFLOP/s)."""


def update_flops(model: Any, samples: Sequence[Sample]) -> int:
    """Return the operations of forward and backward of one update of a language model.

    Args:
        model: Qwen2 of transformers, with or without adapters of peft.
        samples: The batch.
    """
    lengths = [len(sample["input_ids"]) for sample in samples]
    config = model.config
    flops = 0
    for name, parameter in model.named_parameters():
        is_only_looked_up = name.endswith("embed_tokens.weight") and not config.tie_word_embeddings
        if parameter.ndim == 2 and not is_only_looked_up:
            flops += (6 if parameter.requires_grad else 4) * parameter.numel() * sum(lengths)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return flops + int(12 * config.num_hidden_layers * config.hidden_size * pairs)


def matrix_rate(device: torch.device, precision: str) -> float | None:
    """Return the operations per second of large bf16 matrix products on a device; None for other cards or dtypes."""
    if device.type != "cuda" or precision != "bf16":
        return None
    return MATRIX_FLOPS_PER_S.get(torch.cuda.get_device_name(device))
