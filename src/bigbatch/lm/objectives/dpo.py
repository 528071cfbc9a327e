"""The losses of direct preference optimization, and log-probabilities of answers.

labels, logits → log-probability of each answer → difference from that of the reference → loss of each pair
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.lm.data.dataset import IGNORED
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.objectives.pair_metrics import PairMetrics
from bigbatch.lm.objectives.reward import in_full_precision


class DPOLoss:
    """A loss function for `bigbatch.Engine`: the loss of pairs of answers, summed.

        d = log π(answer | prompt) − log π_ref(answer | prompt)                              Σ over the answer's tokens
        sigmoid    −(1 − s) · log σ(β (d_chosen − d_rejected)) − s · log σ(−β (d_chosen − d_rejected))
        ipo        (d_chosen / n_chosen − d_rejected / n_rejected − 1 / 2β)²                 n tokens of each answer

    Rafailov et al., "Direct Preference Optimization", 2023, equation 7; with label smoothing: Mitchell, "A note on DPO
    with noisy preferences", 2023, equation 3, which TRL no longer has; Azar et al., "A General Theoretical Paradigm",
    2023, equation 17, by the mean over tokens as in TRL's DPOTrainer.

    Args:
        device_spec: Decides about autocast.
        metrics: Receives the implicit rewards ``chosen_reward`` and ``rejected_reward``, β·d, their difference
            ``margin``, and ``accuracy``, whether it is above 0.
        beta: β.
        kind: Of the loss.
        label_smoothing: s, the assumed share of pairs whose answers are exchanged.
    """

    METRICS = ("accuracy", "margin", "chosen_reward", "rejected_reward")

    def __init__(
        self,
        device_spec: DeviceSpec,
        metrics: PairMetrics,
        *,
        beta: float = 0.1,
        kind: Literal["sigmoid", "ipo"] = "sigmoid",
        label_smoothing: float = 0.0,
    ) -> None:
        self._device_spec = device_spec
        self._metrics = metrics
        self._beta = beta
        self._kind = kind
        self._smoothing = label_smoothing

    def __call__(self, model: nn.Module, microbatch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the summed loss of a micro-batch of `bigbatch.lm.data.pair_batches.collate_pairs`, and its pairs."""
        chosen, rejected = answer_log_probs(model, microbatch, self._device_spec).chunk(2)
        reference = microbatch["reference"].to(chosen.dtype)
        chosen, rejected = chosen - reference[:, 0], rejected - reference[:, 1]
        if self._kind == "ipo":
            tokens = (microbatch["labels"] != IGNORED).sum(dim=1)
            tokens_chosen, tokens_rejected = tokens.chunk(2)
            losses = (chosen / tokens_chosen - rejected / tokens_rejected - 1 / (2 * self._beta)).square()
        else:
            logits = self._beta * (chosen - rejected)
            losses = -(1 - self._smoothing) * F.logsigmoid(logits) - self._smoothing * F.logsigmoid(-logits)
        margin = self._beta * (chosen - rejected)
        self._metrics.record(
            microbatch["index"],
            accuracy=margin > 0,
            margin=margin,
            chosen_reward=self._beta * chosen,
            rejected_reward=self._beta * rejected,
        )
        return losses.sum(), torch.full((), len(losses), device=losses.device)


def answer_log_probs(model: Any, microbatch: dict[str, Tensor], device_spec: DeviceSpec) -> Tensor:
    """Return the log-probability of the answer of each row, ``[rows]``, in float32 (float64 for a float64 model)."""
    labels = microbatch["labels"]
    with device_spec.autocast():
        inputs = {name: microbatch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits
    logits = in_full_precision(logits).flatten(0, 1)
    losses = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none")
    return -losses.view(labels.shape).sum(dim=1)
