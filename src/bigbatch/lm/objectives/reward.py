"""The loss of a reward model: the score of the chosen answer should be above that of the rejected one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.objectives.pair_metrics import PairMetrics


class RewardLoss:
    """A loss function for `bigbatch.Engine`: the loss of pairs of answers, summed.

        −log σ(r_chosen − r_rejected)  +  c · (r_chosen + r_rejected)²

    with the scores r of a model with one label. Ouyang et al., "Training language models to follow instructions with
    human feedback", 2022, equation 1; the second term: Eisenstein et al., "Helping or Herding?", 2023, section 2.
    Both as TRL's RewardTrainer computes them.

    Args:
        device_spec: Decides about autocast.
        metrics: Receives ``accuracy``, whether r_chosen > r_rejected, and ``margin``, r_chosen − r_rejected.
        center: The weight c; None without the second term.
    """

    METRICS = ("accuracy", "margin")

    def __init__(self, device_spec: DeviceSpec, metrics: PairMetrics, *, center: float | None = None) -> None:
        self._device_spec = device_spec
        self._metrics = metrics
        self._center = center

    def __call__(self, model: nn.Module, microbatch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the summed loss of a micro-batch of `bigbatch.lm.data.pair_batches.collate_pairs`, and its pairs."""
        with self._device_spec.autocast():
            inputs = {name: microbatch[name] for name in ("input_ids", "attention_mask")}
            scores = model(**inputs, use_cache=False).logits.squeeze(-1)
        chosen, rejected = in_full_precision(scores).chunk(2)
        margin = chosen - rejected
        loss_sum = -F.logsigmoid(margin).sum()
        if self._center is not None:
            loss_sum = loss_sum + self._center * (chosen + rejected).square().sum()
        self._metrics.record(microbatch["index"], accuracy=margin > 0, margin=margin)
        return loss_sum, torch.full((), len(margin), device=margin.device)


def in_full_precision(values: Tensor) -> Tensor:
    """Return values in float32, or in float64 if they are."""
    return values.double() if values.dtype.itemsize == 8 else values.float()
