"""Frozen linear layers whose weights are stored in 4 bits, with the kernels of bitsandbytes.

    W[i] = level[code[i]] · scale[i // 64]        y = x·Wᵀ + b        dx = dy·W

The 16 levels are quantiles of a normal distribution: "NF4" of Dettmers et al., "QLoRA", 2023, section 3, where the
scales are quantized too, to 8 bits ("double quantization"). The weight is computed in the dtype of the inputs for each
product and freed after it, in forward and again in backward, so that one weight of a model exists at a time.
"""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.errors import InputError, first_line

BLOCK = 64
"""Consecutive elements of a weight, row by row, that have one scale."""

SCALE_BLOCK = 256
"""Scales that have one scale of their own, with double quantization."""

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_kernels(needed_by: str = "--quantize") -> None:
    """Import bitsandbytes, which registers its operations.

    Args:
        needed_by: The flag that needs it.

    Raises:
        InputError: It is not installed, or its import fails.
    """
    try:
        import_module("bitsandbytes")
    except ModuleNotFoundError as error:
        if error.name != "bitsandbytes":
            raise
        raise InputError(
            f'{needed_by} needs the package bitsandbytes: install it with pip install "bigbatch[quantize]".'
        ) from error


def check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Quantize a block on a device, and compare it with what the CPU computes.

    Raises:
        InputError: bitsandbytes is missing or does not support the device.
    """
    load_kernels()
    block = torch.linspace(-1, 1, BLOCK).view(1, BLOCK)
    expected = Nf4Linear(block).dequantized(torch.float32)
    try:
        found = Nf4Linear(block.to(device)).dequantized(dtype)
        why = None if torch.allclose(found.float().cpu(), expected, atol=1e-2) else "its values are wrong"
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises that does not exist for the device
        why = first_line(error)
    if why is not None:
        raise InputError(
            f"--quantize is not supported on {device} by bitsandbytes: {why}. Leave it out, or use another --device."
        )


class Nf4Linear(nn.Linear):
    """A linear layer with a frozen weight in 4 bits.

    Args:
        weight: ``[out_features, in_features]``, on any device; on ``meta`` the layer has shapes alone.
        bias: As it is; None for none.
        double: Whether the scales are quantized too: 4.13 bits per element instead of 4.5.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None, *, double: bool = False) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self._dtype = weight.dtype
        kept = weight.detach().to(torch.float32) if weight.dtype not in _KERNEL_DTYPES else weight.detach()
        codes, scales = torch.ops.bitsandbytes.quantize_4bit(kept.contiguous(), BLOCK, "nf4", torch.uint8)
        self.codes = _frozen(codes)
        if double:
            mean = scales.mean()
            levels = _scale_levels().to(scales.device)
            scales, scale_scales = torch.ops.bitsandbytes.quantize_blockwise(scales - mean, levels, SCALE_BLOCK)
        self.scales = _frozen(scales)
        if double:
            self.scale_scales, self.scale_levels, self.scale_mean = map(_frozen, (scale_scales, levels, mean))
        self.register_parameter("bias", bias)
        self.is_double = double

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight, computed at each access in the dtype that it was quantized from."""
        return self.dequantized(self._dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in a dtype, ``[out_features, in_features]``."""
        return _dequantize(self.stored(), self.out_features, self.in_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return x·Wᵀ + b, under autocast in its dtype."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        product: Any = _Product.apply
        y: Tensor = product(x.to(dtype), bias, self.out_features, self.in_features, *self.stored())
        return y

    def stored(self) -> list[Tensor]:
        """Return the parameters but the bias."""
        more = [self.scale_scales, self.scale_levels, self.scale_mean] if self.is_double else []
        return [self.codes, self.scales, *more]

    def extra_repr(self) -> str:
        """Describe the layer."""
        return f"{super().extra_repr()}, nf4{' with quantized scales' if self.is_double else ''}"


class _Product(torch.autograd.Function):
    """The product with a weight that only its 4 bits are saved of."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, out_features: int, in_features: int, *stored: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.shape = out_features, in_features
        return F.linear(x, _dequantize(stored, out_features, in_features, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        stored = ctx.saved_tensors
        nothing = (None,) * (3 + len(stored))
        out_features, in_features = ctx.shape
        if torch.compiler.is_compiling():
            return input_gradient(gradient, list(stored), out_features, in_features), *nothing
        return gradient @ _dequantize(stored, out_features, in_features, gradient.dtype), *nothing


@torch.library.custom_op("bigbatch::nf4_input_gradient", mutates_args=())
def input_gradient(gradient: Tensor, stored: list[Tensor], out_features: int, in_features: int) -> Tensor:
    """Return dy·W as one operation.

    The compiler would otherwise merge the computation of the weight with that of forward, and keep every weight from
    forward to backward.
    """
    return gradient @ _dequantize(stored, out_features, in_features, gradient.dtype)


@input_gradient.register_fake
def _(gradient: Tensor, stored: list[Tensor], out_features: int, in_features: int) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], in_features))


def _dequantize(
    stored: list[Tensor] | tuple[Tensor, ...], out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    codes, scales, *double = stored
    if double:
        scale_scales, levels, mean = double
        dequantize = torch.ops.bitsandbytes.dequantize_blockwise
        scales = dequantize(scales, scale_scales, levels, SCALE_BLOCK, torch.float32) + mean
    kernel_dtype = dtype if dtype in _KERNEL_DTYPES else torch.float32
    shape = [out_features, in_features]
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, "nf4", shape, kernel_dtype)
    return weight.to(dtype)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _scale_levels() -> Tensor:
    levels: Tensor = import_module("bitsandbytes.functional").create_dynamic_map()
    return levels
