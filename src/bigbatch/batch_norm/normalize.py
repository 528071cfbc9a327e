"""Normalize a micro-batch by statistics of the whole batch, with the gradient of the whole batch.

forward     y = w (x − mean) / σ + b
backward    ∂x = w/σ (∂y − Σ ∂y / n − (x − mean) Σ ∂y (x − mean) / (n σ²))        sums over the whole batch
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbatch.batch_norm.moments import Moments, along_channels, reduced
from bigbatch.errors import InputError

AddUp: TypeAlias = Callable[[Tensor], Tensor]
"""Returns the sum of the values of all micro-batches and ranks, given those of one."""


def normalize(
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    moments: Moments,
    add_up: AddUp,
    releases_input: bool = False,
) -> Tensor:
    """Return normalized inputs; their backward waits in ``add_up`` for those of the other micro-batches.

    Args:
        inputs: ``[samples, channels, ...]`` of a micro-batch.
        weight: Factor of each channel; None for 1.
        bias: Summand of each channel; None for 0.
        eps: Added to the variance.
        moments: Of the whole batch.
        add_up: Called in the backward with ``[2, channels]``.
        releases_input: Whether the backward does not reference the input while it waits, but reads it a second time:
            it is kept on the host.
    """
    dtypes = [None if tensor is None else tensor.dtype for tensor in (inputs, weight, bias)]
    settings = _Settings(eps, moments, add_up, releases_input, dtypes)
    outputs: Tensor = _Normalize.apply(inputs, weight, bias, settings)  # type: ignore[no-untyped-call]
    return outputs


class _Settings(NamedTuple):
    eps: float
    moments: Moments
    add_up: AddUp
    releases_input: bool
    dtypes: Sequence[torch.dtype | None]


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, settings: _Settings) -> Tensor:
        ctx.save_for_backward(x, weight)
        vars(ctx).update(settings=settings)
        moments = settings.moments
        wide = moments.values.dtype  # that kernels expect of statistics, weight and bias for narrow inputs
        weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
        return F.batch_norm(x, moments.mean, moments.variance, weight, bias, training=False, eps=settings.eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable raises in the second backward only, which may leave it out
            raise InputError(
                'a gradient through a batch norm is computed with create_graph=True, and with batch_norm="exact" it '
                "has no graph: leave the penalty on gradients out of loss_fn, or leave batch_norm= out."
            )
        eps, moments, add_up, releases_input, dtypes = ctx.settings
        x, weight = ctx.saved_tensors
        own = _sums(x, gradient, moments.mean)
        invstd = torch.rsqrt(moments.variance + eps)
        gradients: list[Tensor | None] = [None, own[1] * invstd, own[0]]
        if ctx.needs_input_grad[0]:
            if releases_input:
                del x
            means = add_up(own) / moments.count
            if releases_input:
                x, weight = ctx.saved_tensors
            factor = invstd if weight is None else invstd * weight
            gradients[0] = _input_gradient(x, gradient, means, moments.mean, invstd, factor)
        needed = zip(gradients, ctx.needs_input_grad, dtypes, strict=False)
        return *(g.to(dtype) if g is not None and needs else None for g, needs, dtype in needed), None


def _sums(x: Tensor, gradient: Tensor, mean: Tensor) -> Tensor:
    """Return Σ ∂y and Σ ∂y (x − mean) of each channel."""
    gradient = gradient.to(mean.dtype)
    product = (x - along_channels(mean, x)).mul_(gradient)
    return torch.stack([gradient.sum(reduced(x)), product.sum(reduced(x))])


def _input_gradient(x: Tensor, gradient: Tensor, means: Tensor, mean: Tensor, invstd: Tensor, factor: Tensor) -> Tensor:
    mean_gradient, mean_product = means
    part = (along_channels(mean, x) - x).mul_(along_channels(mean_product * invstd**2, x))
    return part.add_(gradient).sub_(along_channels(mean_gradient, x)).mul_(along_channels(factor, x))
