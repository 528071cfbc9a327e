"""The loss of an embedding model: each query finds its passage among those of the whole global batch.

rows → hidden states → pooled, normalized → features of each example            `encode`, for a micro-batch
features of all examples → similarities → cross-entropy of the right passage    `loss`, for the global batch
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.coupled.coupled import Coupled
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.objectives.pair_metrics import PairMetrics
from bigbatch.lm.objectives.reward import in_full_precision

Pooling = Literal["mean", "last"]


class EmbeddingLoss(Coupled):
    """`bigbatch.Coupled` whose loss is the mean cross-entropy of the positive passage of each query.

        s(q, p) = cos(q, p) / temperature
        loss    = mean over the queries q of −log( exp s(q, positive of q) / Σ_p exp s(q, p) )

    with the positives and the negatives of all queries of the global batch, on all ranks, as the passages p. Henderson
    et al., "Efficient Natural Language Response Suggestion for Smart Reply", 2017, section 4.4; the
    MultipleNegativesRankingLoss of sentence-transformers with the scale 1 / temperature.

    Args:
        device_spec: Decides about autocast.
        metrics: Receives ``accuracy``, whether the positive is the most similar of all passages.
        pooling: What the vector of a text is.
        temperature: See above.
        over_ranks: Whether features are gathered from several ranks.
    """

    METRICS = ("accuracy",)

    def __init__(
        self,
        device_spec: DeviceSpec,
        metrics: PairMetrics,
        *,
        pooling: Pooling = "mean",
        temperature: float = 0.05,
        over_ranks: bool = True,
    ) -> None:
        super().__init__(self._encode, self._loss, gather="all" if over_ranks else "none")
        self._device_spec = device_spec
        self._metrics = metrics
        self._pooling: Pooling = pooling
        self._temperature = temperature

    def _encode(self, model: nn.Module, microbatch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``vectors``, ``[samples, parts, width]`` of length 1, ``index``, and ``present`` if some are not."""
        mask = microbatch["attention_mask"]
        with self._device_spec.autocast():
            # Embedding models have no cache, and some do not accept use_cache.
            output = model(input_ids=microbatch["input_ids"], attention_mask=mask)
        vectors = pool(output.last_hidden_state, mask, self._pooling)
        num_samples = len(microbatch["index"])
        vectors = F.normalize(vectors, dim=-1).view(-1, num_samples, vectors.shape[-1]).transpose(0, 1)
        features = {"vectors": vectors, "index": microbatch["index"]}
        if "present" in microbatch:
            features["present"] = microbatch["present"]
        return features

    def _loss(self, model: nn.Module, features: dict[str, Tensor]) -> Tensor:
        """Return the mean loss of all queries."""
        queries, *passages = features["vectors"].unbind(dim=1)
        scores = queries @ torch.cat(passages).T / self._temperature
        if "present" in features:
            present = torch.cat(features["present"].unbind(dim=1)[1:])
            scores = scores.masked_fill(~present, -torch.inf)
        labels = torch.arange(len(queries), device=scores.device)
        self._metrics.record(features["index"], accuracy=scores.argmax(dim=1) == labels)
        return F.cross_entropy(scores, labels)


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Return one vector for each row, ``[rows, width]``, in float32 (float64 of float64).

    Args:
        hidden: ``[rows, length, width]``.
        mask: 1 for tokens and 0 for padding on the right, ``[rows, length]``.
        pooling: The mean over tokens, or the last token.
    """
    hidden = in_full_precision(hidden)
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1]
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def write_sentence_transformers_files(folder: Path, *, pooling: Pooling, max_length: int, width: int) -> None:
    """Write the files that make a folder of transformers one of sentence-transformers, with the pooling of the run."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    kind = {"mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}[pooling]
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{name}"}
            for place, (path, name) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            **dict.fromkeys(("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_lasttoken"), False),
            kind: True,
        },
    }
    for path, _ in modules[1:]:
        (folder / path).mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
