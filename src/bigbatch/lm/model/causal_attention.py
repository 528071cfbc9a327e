"""Causal attention without a mask: right-padded rows need none, and packed rows are told apart by their offsets.

transformers makes a mask of rows × length × length where a row is padded, and reads values back to the host to find out
whether it may leave it away. Under an attention implementation that it knows no mask for it does neither.
"""

import inspect
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.varlen import varlen_attn

from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.padding_check import ignores_right_padding, reference_logits

NAME = "bigbatch_causal"
AGREEMENT_TOLERANCE = 0.02  # of the logits, in any precision; a bias that is missing changes them by much more
VARLEN_DTYPES = (torch.bfloat16, torch.float16)
# torch 2.11 shares key and value heads unasked, later ones want to be asked
_SHARED_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def drop_mask_if_causal(model: Any, device_spec: DeviceSpec, *, max_length: int) -> bool:
    """Let a model attend without a mask where right-padded rows need none; tell whether it does.

    Tried on the model itself by `ignores_right_padding`. A window or chunk shorter than ``max_length`` needs the mask
    that transformers makes for it.

    Args:
        model: A transformers language model, on its device, without adapters.
        device_spec: Decides about autocast.
        max_length: Tokens of the longest row that will come.
    """
    if not ignores_right_padding(model, device_spec):
        return False
    if has_full_attention(model.config, max_length=max_length):
        expected = reference_logits(model, device_spec)
        use_causal_attention(model)
        if (
            reference_logits(model, device_spec) - expected
        ).norm() > AGREEMENT_TOLERANCE * expected.norm():  # its masks say more than causal
            model.set_attn_implementation("sdpa")
    return True


def has_full_attention(config: Any, *, max_length: int) -> bool:
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
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within rows, or within the sequences of one row; tensors are ``[rows, heads, length, width]``.

    The offsets of packed sequences come under the names that transformers has for them.
    """
    if cu_seq_lens_q is not None:
        assert max_length_q is not None, "offsets come with the length of the longest sequence"
        return attend_packed(query, key, value, cu_seq_lens_q, max_length_q, **options), None
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1 and query.is_cuda and query.dtype not in VARLEN_DTYPES:
        # Wider dtypes have no kernel there that shares key and value heads, but the one that writes out all pairs.
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    window = options.get("sliding_window")
    mask = None
    if window is not None and key.shape[2] > window:
        mask = _window_mask(query.shape[2], key.shape[2], window, query.device)
    result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **options)
    return result


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **options: Any,
) -> Tensor:
    """Attend causally within each of the sequences that one row consists of.

    On CUDA it is one kernel of torch, in bfloat16 or float16; elsewhere one call for each sequence, in any dtype.

    Args:
        query: ``[1, heads, tokens, width]``.
        key: ``[1, key heads, tokens, width]``; heads are a multiple of key heads.
        value: As ``key``.
        offsets: int32 ``[sequences + 1]``: where sequences begin, and the tokens at the end. Sequences may be empty,
            and must cover the row: the kernel writes neither the output nor the gradient of a token outside, and a NaN
            that is there by chance reaches every weight.
        longest: At least the tokens of the longest sequence.
        scaling: Of the products; by default 1 / √width.
        dropout: Only on the CPU.
        sliding_window: How many tokens each attends to, itself included; None for all before.
        options: Others that transformers hands to attention.

    Returns:
        ``[1, tokens, heads, width]``.

    Raises:
        ValueError: Something that attention within sequences does not have.
    """
    unknown = [name for name in ("softcap", "s_aux") if options.get(name) is not None]
    if unknown:
        raise ValueError(f"attention with {unknown[0]} is not there for packed rows")
    if not query.is_cuda and not isinstance(query, FakeTensor):
        parts = [
            _attend_to_one(query[:, :, part], key[:, :, part], value[:, :, part], scaling, dropout, sliding_window)
            for part in _slices(offsets)
        ]
        return torch.cat(parts, 2).transpose(1, 2)
    if dropout:
        raise ValueError("attention with dropout is not there for packed rows")
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    kernel: Any = varlen_attn
    attended: Tensor = kernel(
        query, key, value, offsets, offsets, longest, longest, scale=scaling, window_size=window, **_SHARED_HEADS
    )
    return attended[None]


def _slices(offsets: Tensor) -> Iterator[slice]:
    places = offsets.tolist()
    return (slice(start, end) for start, end in pairwise(places) if end > start)


def _attend_to_one(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    length = query.shape[2]
    mask = None if window is None or length <= window else _window_mask(length, length, window, query.device)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _window_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Tell which keys the last so many queries attend to, bool ``[1, 1, queries, keys]``."""
    key = torch.arange(keys, device=device)
    query = key[keys - queries :, None]
    return ((key <= query) & (key > query - window))[None, None]
