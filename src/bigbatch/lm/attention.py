"""Causal attention without a mask: right-padded rows need none, and the kernels are faster and smaller without one.

transformers makes a mask of rows × length × length where a row is padded, and reads values back to the host to find out
whether it may leave it away. Under an attention implementation that it knows no mask for it does neither.
"""

from typing import Any

import torch
from torch import Tensor

from bigbatch.lm.device import Machine
from bigbatch.lm.padding import ignores_right_padding, short_logits

NAME = "bigbatch_causal"
SAME = 0.02  # of the logits, in any precision; a bias that is missing changes them by much more


def leave_out_mask(model: Any, machine: Machine, *, max_length: int) -> bool:
    """Let a model attend without a mask where right-padded rows need none; tell whether it does.

    Tried on the model itself by `ignores_right_padding`. A window or chunk shorter than ``max_length`` needs the mask
    that transformers makes for it.

    Args:
        model: A transformers language model, on its device, without adapters.
        machine: Decides about autocast.
        max_length: Tokens of the longest row that will come.
    """
    if not ignores_right_padding(model, machine):
        return False
    if attends_to_all(model.config, max_length=max_length):
        expected = short_logits(model, machine)
        use_causal_attention(model)
        if (short_logits(model, machine) - expected).norm() > SAME * expected.norm():  # its masks say more than causal
            model.set_attn_implementation("sdpa")
    return True


def attends_to_all(config: Any, *, max_length: int) -> bool:
    """Tell from a configuration whether layers attend through torch, and to everything before within a length."""
    if getattr(config, "_attn_implementation", None) not in ("sdpa", NAME):
        return False
    limits = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return all(limit is None or limit >= max_length for limit in limits)


def looks_causal(model: Any) -> bool:
    """Tell from its layers whether a model is causal, where it has no weights to try it with."""
    return all(getattr(module, "is_causal", True) is not False for module in model.modules())


def use_causal_attention(model: Any) -> None:
    """Let every layer of a model attend causally, without a mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    model.set_attn_implementation(NAME)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1 and query.is_cuda and query.dtype not in (torch.bfloat16, torch.float16):
        # Wider dtypes have no kernel there that shares key and value heads, but the one that writes out all pairs.
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, None, **options)
    return result
