"""FlashAttention-4 for packed rows, as an operator that torch compiles, checkpoints and captures in CUDA graphs.

The kernels are those of ``flash_attn.cute`` (the package flash-attn-4), for Hopper and Blackwell; they are compiled
when they are first used. torch 2.11 can install them itself, but then refuses the backward of packed rows.
"""

import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from bigbatch.errors import first_line

CAPABILITIES = (9, 10)  # Hopper, Blackwell: with a backward for every width that is used here
DTYPES = (torch.bfloat16, torch.float16)


def kernel_obstacle(device: torch.device) -> str | None:
    """Return why a device cannot run the kernels, in a few words; None if it may."""
    if device.type != "cuda":
        return f"it has no kernel for {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in CAPABILITIES:
        return f"it has no kernel for compute capability {major}.{minor}"
    try:
        if importlib.util.find_spec("flash_attn.cute") is None:
            raise ImportError
    except ImportError:  # also where another flash_attn is installed
        return 'it is not installed: pip install "bigbatch[fa4]"'
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its dependencies
            _kernels()
    except Exception as error:  # noqa: BLE001 - an installation that does not fit torch or the driver
        return f"it cannot be imported ({first_line(error)})"
    return None


def _kernels() -> Any:
    from flash_attn.cute import interface

    return interface


def flash_attention_4(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, *, scale: float, window: int | None
) -> Tensor:
    """Attend causally within each sequence of one packed row. The backward is deterministic if torch's algorithms are.

    Args:
        query: bfloat16 or float16 ``[tokens, heads, width]``.
        key: ``[tokens, key heads, width]``; heads are a multiple of key heads.
        value: As ``key``.
        offsets: int32 ``[sequences + 1]``: starts of the sequences, then the number of tokens.
        longest: At least the tokens of the longest sequence.
        scale: Factor of the products.
        window: Tokens that each token attends to, itself included; None for all previous ones.

    Returns:
        ``[tokens, heads, width]``.
    """
    attended: Tensor
    attended, _ = _forward(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        offsets,
        longest,
        scale,
        window,
        torch.are_deterministic_algorithms_enabled(),
    )
    return attended


@torch.library.custom_op("bigbatch::flash_attention_4", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    scale: float,
    window: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Return the result and the logarithm of each token's sum of exponentials, float32 ``[heads, tokens]``."""
    attended, sums, *_ = _kernels()._flash_attn_fwd(
        query, key, value, softmax_scale=scale, return_lse=True, **_rows(offsets, longest, window)
    )
    return attended, sums


@_forward.register_fake
def _forward_shapes(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = query.shape
    return query.new_empty(tokens, heads, value.shape[2]), query.new_empty(heads, tokens, dtype=torch.float32)


@torch.library.custom_op("bigbatch::flash_attention_4_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Tensor,
    sums: Tensor,
    offsets: Tensor,
    longest: int,
    scale: float,
    window: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    of_query, of_key, of_value = _kernels()._flash_attn_bwd(
        query,
        key,
        value,
        attended,
        gradient,
        sums,
        softmax_scale=scale,
        deterministic=deterministic,
        **_rows(offsets, longest, window),
    )
    return of_query, of_key, of_value


@_backward.register_fake
def _backward_shapes(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _rows(offsets: Tensor, longest: int, window: int | None) -> dict[str, Any]:
    """Return the arguments that say which tokens attend to which."""
    return {
        "causal": window is None,
        "window_size_left": None if window is None else window - 1,
        "window_size_right": None if window is None else 0,
        "cu_seqlens_q": offsets,
        "cu_seqlens_k": offsets,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, offsets, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, *output, offsets)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gradient: Tensor | None, _of_sums: Tensor | None) -> tuple[Any, ...]:
    if gradient is None:
        return (None,) * 8
    query, key, value, attended, sums, offsets = ctx.saved_tensors
    gradients = _backward(gradient.contiguous(), query, key, value, attended, sums, offsets, *ctx.options)
    return (*gradients, *(None,) * 5)


_forward.register_autograd(_differentiate, setup_context=_save)
