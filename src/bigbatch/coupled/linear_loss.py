"""A loss that is linear in features: its backward sends given gradients into them.

loss = value + Σ (features − features) · gradients        ∂loss/∂features = gradients
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_loss(value: Tensor, features: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Return a 0-d loss with a given value and given gradients.

    Args:
        value: 0-d, without a graph.
        features: With a graph; of any dtypes.
        gradients: As many, of the same shapes; in the dtypes of the features or wider.
    """
    loss: Tensor = _LinearLoss.apply(value, gradients, *features)  # type: ignore[no-untyped-call]
    return loss


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *features: Tensor) -> Tensor:
        vars(ctx).update(gradients=gradients, dtypes=[feature.dtype for feature in features])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (gradient * factor.to(gradient.device) for gradient in ctx.gradients)
        return None, None, *(part.to(dtype) for part, dtype in zip(scaled, ctx.dtypes, strict=True))
