"""Causal attention without a mask: right-padded rows need none, and packed rows are separated by offsets.

For padded rows transformers builds a mask of rows × length × length, and synchronizes with the device to decide whether
it can be omitted. For an attention implementation without a registered mask function it does neither.
"""

import inspect
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.varlen import varlen_attn

from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.flash_attention_4 import flash_attention_4
from bigbatch.lm.model.padding_check import ignores_right_padding, reference_logits

Kernel = Literal["torch", "fa4"]
NAME = "bigbatch_causal"
NAMES: dict[Kernel, str] = {"torch": NAME, "fa4": "bigbatch_causal_fa4"}
AGREEMENT_TOLERANCE = 0.02  # relative, of the logits, in any precision; a missing bias changes them by much more
VARLEN_DTYPES = (torch.bfloat16, torch.float16)
# torch 2.11 shares key and value heads by default; later versions need the argument
_SHARED_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def drop_mask_if_causal(model: Any, device_spec: DeviceSpec, *, max_length: int) -> bool:
    """Switch a model to attention without a mask if right-padded rows need none; return whether they need none.

    `ignores_right_padding` checks this on the model. A window or chunk shorter than ``max_length`` needs the mask that
    transformers builds for it.

    Args:
        model: A transformers language model, on its device, without adapters.
        device_spec: Decides about autocast.
        max_length: Tokens of the longest row.
    """
    if not ignores_right_padding(model, device_spec):
        return False
    if has_full_attention(model.config, max_length=max_length):
        expected = reference_logits(model, device_spec)
        use_causal_attention(model)
        difference = reference_logits(model, device_spec) - expected
        if difference.norm() > AGREEMENT_TOLERANCE * expected.norm():  # its masks are more than causal
            model.set_attn_implementation("sdpa")
    return True


def has_full_attention(config: Any, *, max_length: int) -> bool:
    """Return whether layers use torch's attention, over all previous tokens of at most ``max_length``."""
    if getattr(config, "_attn_implementation", None) not in ("sdpa", *NAMES.values()):
        return False
    limits = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return all(limit is None or limit >= max_length for limit in limits)


def looks_causal(model: Any) -> bool:
    """Return whether the layers of a model are causal, by their attributes: for models without weights to test."""
    return all(getattr(module, "is_causal", True) is not False for module in model.modules())


def use_causal_attention(model: Any, kernel: Kernel = "torch") -> None:
    """Switch every layer of a model to causal attention without a mask.

    Args:
        model: A transformers language model.
        kernel: Of packed rows on CUDA: that of torch, or FlashAttention-4.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAMES[kernel], _attend if kernel == "torch" else _attend_with_flash_attention_4)
    model.set_attn_implementation(NAMES[kernel])


def kernel_of(model: Any) -> Kernel:
    """Return the kernel that `use_causal_attention` has set."""
    name = getattr(model.config, "_attn_implementation", None)
    return next((kernel for kernel, of_kernel in NAMES.items() if of_kernel == name), "torch")


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    kernel: Kernel = "torch",
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within rows, or within the sequences of one packed row; tensors are ``[rows, heads, length, width]``.

    The offsets of packed sequences are passed under the names that transformers uses.
    """
    if cu_seq_lens_q is not None:
        assert max_length_q is not None, "offsets come with the length of the longest sequence"
        return attend_packed(query, key, value, cu_seq_lens_q, max_length_q, kernel=kernel, **options), None
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1 and query.is_cuda and query.dtype not in VARLEN_DTYPES:
        # For wider dtypes, the only CUDA kernel that shares key and value heads materializes the attention matrix.
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    window = options.get("sliding_window")
    mask = None
    if window is not None and key.shape[2] > window:
        mask = _window_mask(query.shape[2], key.shape[2], window, query.device)
    result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **options)
    return result


def _attend_with_flash_attention_4(*tensors: Any, **options: Any) -> tuple[Tensor, None]:
    return _attend(*tensors, kernel="fa4", **options)


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
    kernel: Kernel = "torch",
    **options: Any,
) -> Tensor:
    """Attend causally within each sequence of one packed row.

    On CUDA one kernel, in bfloat16 or float16; on other devices one call per sequence, in any dtype.

    Args:
        query: ``[1, heads, tokens, width]``.
        key: ``[1, key heads, tokens, width]``; heads are a multiple of key heads.
        value: As ``key``.
        offsets: int32 ``[sequences + 1]``: starts of the sequences, then the number of tokens. Sequences may be empty
            and must cover the row: the kernel writes neither the output nor the gradient of a token outside, and a NaN
            in that uninitialized memory would reach every weight.
        longest: At least the tokens of the longest sequence.
        scaling: Factor of the products; by default 1 / √width.
        dropout: Only on the CPU.
        sliding_window: Tokens that each token attends to, itself included; None for all previous tokens.
        kernel: On CUDA.
        options: Further options that transformers passes to attention.

    Returns:
        ``[1, tokens, heads, width]``.

    Raises:
        ValueError: An option that packed attention does not support.
    """
    unknown = [name for name in ("softcap", "s_aux") if options.get(name) is not None]
    if unknown:
        raise ValueError(f"attention with {unknown[0]} is not supported for packed rows")
    if not query.is_cuda and not isinstance(query, FakeTensor):
        parts = [
            _attend_to_one(query[:, :, part], key[:, :, part], value[:, :, part], scaling, dropout, sliding_window)
            for part in _slices(offsets)
        ]
        return torch.cat(parts, 2).transpose(1, 2)
    if dropout:
        raise ValueError("attention with dropout is not supported for packed rows")
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    if kernel == "fa4":
        scale = query.shape[2] ** -0.5 if scaling is None else scaling
        return flash_attention_4(query, key, value, offsets, longest, scale=scale, window=sliding_window)[None]
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    of_torch: Any = varlen_attn
    attended: Tensor = of_torch(
        query, key, value, offsets, offsets, longest, longest, scale=scaling, window_size=window, **_SHARED_HEADS
    )
    return attended[None]


def _slices(offsets: Tensor) -> Iterator[slice]:
    return (slice(start, end) for start, end in pairwise(offsets.tolist()) if end > start)


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
    """Return which keys each of the last ``queries`` tokens attends to, bool ``[1, 1, queries, keys]``."""
    key = torch.arange(keys, device=device)
    query = key[keys - queries :, None]
    return ((key <= query) & (key > query - window))[None, None]
