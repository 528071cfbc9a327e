"""Embed the columns of a micro-batch, by the model of a trainer and by the guides of its loss."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, GISTEmbedLoss
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from bigbatch.errors import InputError
from bigbatch.integrations.sentence_transformers.checks import loss_modules


def embed(model: nn.Module, columns: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """Return the embeddings of each column, ``[samples, width]``.

    Args:
        model: A SentenceTransformer, in its wrapper.
        columns: The features of each; not changed.
    """
    return [model(dict(features))["sentence_embedding"] for features in columns]


def guided_losses(loss: nn.Module) -> list[Any]:
    """Return the modules of a loss that compare embeddings of a second, frozen model."""
    return [module for module in loss_modules(loss) if isinstance(module, GISTEmbedLoss | CachedGISTEmbedLoss)]


def embed_by_guide(loss: Any, columns: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """Return the embeddings of each column by the guide of a loss, without gradients.

    As in the forward of GISTEmbedLoss: texts are tokenized again if the guide has another tokenizer.

    Args:
        loss: One of `guided_losses`.
        columns: The features of each; not changed.
    """
    with torch.no_grad():
        if loss.must_retokenize:
            columns = [_tokenized_again(loss, features) for features in columns]
        return embed(loss.guide, columns)


def _tokenized_again(loss: Any, features: Mapping[str, Any]) -> Mapping[str, Any]:
    ids = features["input_ids"]
    if "cu_seq_lens_q" in features:  # one row of all samples
        bounds = features["cu_seq_lens_q"].tolist()
        ids = [ids[0, start:stop] for start, stop in pairwise(bounds)]
    texts = loss.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return batch_to_device(loss.guide.preprocess(texts), loss.guide.device)  # type: ignore[no-any-return]


def check_columns(columns: Sequence[Any]) -> None:
    """Check that a micro-batch has columns to embed.

    Raises:
        InputError: It has none.
    """
    if not columns:
        raise InputError(
            "the data collator returned no column of texts or images, so there is nothing to embed: see "
            "trainer.collect_features."
        )
