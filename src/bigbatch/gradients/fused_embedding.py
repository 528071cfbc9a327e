"""An embedding that adds the rows of its gradient to a sum, and the weight that a head shares with it.

The gradient of an embedding has a row for each token. Autograd makes a matrix of the whole vocabulary of it, which it
adds to the gradient of a head with the same weight, and then to the sum. Here the rows are added to the gradient of the
head, and the result to the sum, once the backward has ended: a retry after out-of-memory finds it unchanged.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.gradients.fused_linear import FusedLinear, WeightSum, find_sum, ordinary_copy


class FusedEmbedding(nn.Embedding):
    """What `install_embedding` makes of an ``nn.Embedding``: the same parameter, outputs and gradient."""

    _bigbatch_key: Tensor
    _bigbatch_weight: Tensor  # as for `FusedLinear`

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in torch
        """Return the rows of the weight at indices; in compiled code, autograd computes the gradient."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not self.weight.requires_grad:
            return super().forward(input)
        if type(input) is not Tensor or torch._C._are_functorch_transforms_active():
            return super().forward(input)
        if self.weight is not self._bigbatch_weight:
            return super().forward(input)
        output: Tensor = _Embedding.apply(self.weight, input, self.padding_idx, self._bigbatch_key)  # type: ignore[no-untyped-call]
        return output

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle as the ordinary layer, as for `FusedLinear`."""
        return ordinary_copy(self, nn.Embedding)


def install_embedding(embedding: nn.Embedding, key: Tensor) -> Callable[[], None]:
    """Make a `FusedEmbedding` of a layer that is exactly an ``nn.Embedding``; return a function that undoes it."""
    assert type(embedding) is nn.Embedding, "subclasses have a forward of their own"
    embedding.__dict__.update({"_bigbatch_key": key, "_bigbatch_weight": embedding.weight})
    embedding.__class__ = FusedEmbedding

    def remove() -> None:
        embedding.__class__ = nn.Embedding
        for name in ("_bigbatch_key", "_bigbatch_weight"):
            embedding.__dict__.pop(name, None)

    return remove


def weights_for_loss(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Return the weight of a linear layer and its copy, for a loss that uses it without the layer's forward.

    If it is tied to an embedding that adds to a sum, so does the gradient of the tensor that is returned. The copy is
    in a narrower dtype; None if there is none.
    """
    if type(linear) is not FusedLinear or torch.compiler.is_compiling() or linear.weight is not linear._bigbatch_weight:
        return linear.weight, None
    weight: Tensor = linear.weight
    if linear._bigbatch_is_tied:
        weight = _TiedWeight.apply(weight, linear._bigbatch_key)  # type: ignore[no-untyped-call]
    return weight, linear._bigbatch_copy


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, indices: Tensor, padding_idx: int | None, key: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.key, ctx.num_rows = key, len(weight)
        ctx.padding_idx = -1 if padding_idx is None else padding_idx
        return torch.embedding(weight, indices, ctx.padding_idx)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        weight_sum = _accepting_sum(ctx.key)
        if weight_sum is None:
            grad = torch.ops.aten.embedding_dense_backward(grad_output, indices, ctx.num_rows, ctx.padding_idx, False)
            return grad, None, None, None
        rows, places = grad_output.reshape(-1, grad_output.shape[-1]), indices.reshape(-1)
        if ctx.padding_idx >= 0:
            rows = rows.masked_fill((places == ctx.padding_idx)[:, None], 0)
        weight_sum.add_rows(places, rows)
        return None, None, None, None


class _TiedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, key: Tensor) -> Tensor:
        ctx.key = key
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None]:
        weight_sum = _accepting_sum(ctx.key)
        if weight_sum is None:
            return grad_output, None
        weight_sum.add_whole(grad_output)
        return None, None


def _accepting_sum(key: Tensor) -> WeightSum | None:
    """Return the sum of a key if the running backward is to add to it."""
    weight_sum = find_sum(key)
    if torch.is_grad_enabled() or weight_sum is None or not weight_sum.accepts_gradient(None):
        return None
    return weight_sum
