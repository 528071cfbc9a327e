"""The losses that cache gradients themselves, such as CachedMultipleNegativesRankingLoss, on known embeddings.

Their forward embeds by itself, and again in the backward of the loss. Their ``calculate_loss`` does not: it computes
the loss in blocks of ``mini_batch_size`` rows, and differentiates each block at once.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from sentence_transformers.base.losses import uses_gradient_cache
from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss
from torch import Tensor, nn

from bigbatch.coupled.linear_loss import linear_loss
from bigbatch.errors import InputError
from bigbatch.integrations.sentence_transformers.checks import loss_modules


def cached_losses(loss: nn.Module) -> list[Any]:
    """Return the modules of a loss whose forward would embed by itself."""
    return [each for each in loss_modules(loss) if uses_gradient_cache(each) and hasattr(each, "calculate_loss")]


def forward_from_embeddings(loss: Any, *, in_float32: bool) -> Callable[..., Tensor]:
    """Return a forward for a loss whose models return known embeddings.

    Args:
        loss: One of `cached_losses`.
        in_float32: Whether it is computed without autocast: gradients of its blocks are not scaled, and many would be
            zero in float16.
    """

    def forward(sentence_features: Sequence[Any], labels: Tensor | None = None) -> Tensor:
        columns = list(sentence_features)
        embeddings = [loss.model(features)["sentence_embedding"] for features in columns]
        second: Any = labels
        if isinstance(loss, CachedGISTEmbedLoss):
            second = [[loss.guide(features)["sentence_embedding"]] for features in columns]
        if not torch.is_grad_enabled():
            return loss.calculate_loss([[each] for each in embeddings], second)  # type: ignore[no-any-return]
        _check(loss, len(columns))
        leaves = [each.detach().requires_grad_() for each in embeddings]
        device = leaves[0].device.type
        with torch.autocast(device, enabled=False) if in_float32 else nullcontext():
            value = loss.calculate_loss([[leaf] for leaf in leaves], second, with_backward=True)
        gradients = [_gradient(loss, column, leaf) for column, leaf in enumerate(leaves, 1)]
        return linear_loss(value.detach(), embeddings, gradients)

    return forward


def _check(loss: Any, num_columns: int) -> None:
    if num_columns < 2:
        raise InputError(f"{type(loss).__name__} needs at least 2 columns of texts, and the dataset has {num_columns}.")
    parts = [p for module in loss_modules(loss) for p in module.named_parameters(recurse=False)]
    own = [name for name, parameter in parts if parameter.requires_grad]
    if own:
        raise InputError(
            f"{type(loss).__name__} has parameters of its own ({', '.join(own)}), whose gradient it adds block by "
            "block: use the loss without gradient cache, whose memory exact() limits as well."
        )


def _gradient(loss: Any, column: int, leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise InputError(
            f"{type(loss).__name__} does not use column {column} of the dataset: remove it, or use another loss."
        )
    return leaf.grad
