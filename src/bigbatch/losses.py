"""Losses over the features of a whole batch, for `bigbatch.Coupled`.

Each is a plain function of features, and without features a loss for `Coupled`, with its options:

    losses.info_nce(queries, keys, temperature=0.1)                           # 0-d
    Coupled(encode, losses.info_nce)                                          # encode returns (queries, keys)
    Coupled(encode, losses.clip(logit_scale=lambda model: model.log_scale.exp()))

``encode`` returns a tuple or list of the features in the order of the arguments, or a mapping by their names. An option
that is learned, such as a temperature, is a parameter, or a function of the model that returns it.
"""

from collections.abc import Callable, Mapping
from functools import partial, wraps
from numbers import Real
from typing import Any, Protocol, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Scale: TypeAlias = float | Tensor
"""A number or a parameter; within `bigbatch.Coupled` also a function of the model that returns one."""

FeatureLoss: TypeAlias = Callable[[Any, Any], Tensor]
"""``loss(model, features) → 0-d``, the second argument of `bigbatch.Coupled`."""


class BatchLoss(Protocol):
    """A function of features, and of a model and features."""

    @overload
    def __call__(self, **options: Any) -> FeatureLoss: ...
    @overload
    def __call__(self, model: nn.Module, features: Any, /, **options: Any) -> Tensor: ...
    @overload
    def __call__(self, *features: Tensor, **options: Any) -> Tensor: ...


def _batch_loss(function: Callable[..., Tensor]) -> BatchLoss:
    """Make a function of features also a loss of `Coupled`, and one with options that returns such a loss."""

    @wraps(function)
    def batch_loss(*features: Any, **options: Any) -> Any:
        if not features and not any(isinstance(value, Tensor) and value.ndim for value in options.values()):
            return partial(_of_model, function, options)
        if features and isinstance(features[0], nn.Module):
            return _of_model(function, options, *features)
        return function(*features, **options)

    return batch_loss


def _of_model(function: Callable[..., Tensor], options: Mapping[str, Any], model: Any, features: Any) -> Tensor:
    """Compute a loss of the features that ``encode`` returned."""
    known = {
        name: option(model) if callable(option) and not isinstance(option, nn.Module) else option
        for name, option in options.items()
    }
    if isinstance(features, Mapping):
        return function(**features, **known)
    return function(*(features if isinstance(features, tuple | list) else (features,)), **known)


def _positive(name: str, value: Scale) -> Scale:
    """Return a number after checking it; a tensor, whose value is on a device, as it is."""
    if not isinstance(value, Tensor) and not (isinstance(value, Real) and value > 0):
        raise ValueError(f"{name} is {value!r}: it must be a number above 0.")
    return value


@_batch_loss
def info_nce(queries: Tensor, keys: Tensor, *, temperature: Scale = 0.07) -> Tensor:
    """Return the mean cross-entropy of finding the key of each query among all keys, by cosine similarity.

    van den Oord et al., "Representation Learning with Contrastive Predictive Coding", arXiv:1807.03748, equation 4.

    Args:
        queries: ``[samples, width]``.
        keys: ``[samples, width]``; key i belongs to query i.
        temperature: Divides the similarities.
    """
    logits = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T / _positive("temperature", temperature)
    return F.cross_entropy(logits, torch.arange(len(queries), device=queries.device))


@_batch_loss
def clip(images: Tensor, texts: Tensor, *, logit_scale: Scale = 1 / 0.07) -> Tensor:
    """Return the symmetric cross-entropy of images among texts and of texts among images.

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020, figure 3.

    Args:
        images: ``[samples, width]``.
        texts: ``[samples, width]``; text i belongs to image i.
        logit_scale: Multiplies the cosine similarities: CLIP's learned ``log_scale.exp()``.
    """
    logits = _positive("logit_scale", logit_scale) * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    labels = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


@_batch_loss
def sup_con(features: Tensor, labels: Tensor, *, temperature: Scale = 0.07) -> Tensor:
    """Return the supervised contrastive loss: views of the same class attract, all others repel.

    Khosla et al., "Supervised Contrastive Learning", arXiv:2004.11362, equation 2 (``L_out``). Views without another
    one of their class are left out of the mean; without any pair the loss is 0.

    Args:
        features: ``[samples, width]``, or ``[samples, views, width]``.
        labels: Classes ``[samples]``.
        temperature: Divides the similarities.
    """
    views = features.shape[1] if features.ndim == 3 else 1
    points = F.normalize(features.reshape(-1, features.shape[-1]), dim=-1)
    classes = labels.repeat_interleave(views)
    itself = torch.eye(len(points), dtype=torch.bool, device=points.device)
    positive = (classes[:, None] == classes) & ~itself
    logits = points @ points.T / _positive("temperature", temperature)
    log_probability = logits.masked_fill(itself, -torch.inf).log_softmax(dim=1)
    count = positive.sum(1)
    mean = log_probability.masked_fill(~positive, 0.0).sum(1) / count.clamp(min=1)
    return -mean.sum() / (count > 0).sum().clamp(min=1)


@_batch_loss
def multiple_negatives_ranking(anchors: Tensor, positives: Tensor, *negatives: Tensor, scale: Scale = 20.0) -> Tensor:
    """Return the mean cross-entropy of the positive of each anchor among all positives and negatives of the batch.

    Henderson et al., "Efficient Natural Language Response Suggestion for Smart Reply", arXiv:1705.00652, section 4.4.

    Args:
        anchors: ``[samples, width]``.
        positives: ``[samples, width]``; positive i belongs to anchor i.
        negatives: Hard negatives, each ``[samples, width]``.
        scale: Multiplies the cosine similarities.
    """
    candidates = F.normalize(torch.cat([positives, *negatives]), dim=-1)
    scores = scale * F.normalize(anchors, dim=-1) @ candidates.T
    return F.cross_entropy(scores, torch.arange(len(anchors), device=anchors.device))
