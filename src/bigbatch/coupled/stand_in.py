"""A loss of single micro-batches that costs what those of a `Coupled` window cost, for trials of sizes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.coupled.coupled import Coupled
from bigbatch.coupled.features import Features, flatten_features, is_differentiable
from bigbatch.coupled.linear_loss import linear_loss


def stand_in(coupled: Coupled, num_samples: int) -> Callable[[nn.Module, Any], tuple[Tensor, int]]:
    """Return a loss function with the time and memory of both passes over one micro-batch.

    It holds features of the whole batch and their gradients, and computes no loss, whose memory does not depend on the
    micro-batch.

    Args:
        coupled: The loss.
        num_samples: Of the batch.
    """

    encode = coupled.encode  # itself among the variables of loss_fn, where modules that it uses are found

    def loss_fn(model: nn.Module, microbatch: Any) -> tuple[Tensor, int]:
        with torch.no_grad():
            held = _repeated(flatten_features(encode(model, microbatch)).detached(), num_samples)
        torch.clear_autocast_cache()
        features = flatten_features(encode(model, microbatch))
        used = [leaf for leaf in features.leaves if is_differentiable(leaf) and leaf.requires_grad]
        rows = features.num_samples
        gradients = [leaf.new_zeros(max(num_samples, rows), *leaf.shape[1:]) for leaf in used]
        value = torch.zeros((), device=used[0].device if used else None)
        loss = linear_loss(value, used, [gradient[:rows] for gradient in gradients]) if used else value
        return loss, rows if held else 0  # held until here, as in a window

    return loss_fn


def _repeated(features: Features, num_samples: int) -> list[Tensor]:
    """Return tensors of the size of the features of the whole batch."""
    tensors = [leaf for leaf in features.leaves if isinstance(leaf, Tensor)]
    return [tensor.new_zeros(num_samples, *tensor.shape[1:]) for tensor in tensors]
