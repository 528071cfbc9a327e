"""Causal language-modelling loss: the sum over the trained tokens, and their number, or the sum of their weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.lm.data.dataset import IGNORED
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.packed_rows import model_inputs


class CausalLMLoss:
    """A loss function for `bigbatch.Engine`: next-token cross entropy, summed.

    Args:
        device_spec: Decides about autocast.
        needs_mask: Whether to pass the attention mask to the model. Without a mask, attention uses its causal kernels,
            whose memory is linear in the tokens of a row, not quadratic. Correct only for a model for which
            `ignores_right_padding` is true.
        longest: Tokens of the longest sequence of all packed rows.
    """

    def __init__(self, device_spec: DeviceSpec, *, needs_mask: bool = True, longest: int | None = None) -> None:
        self._device_spec = device_spec
        self._needs_mask = needs_mask
        self._longest = longest

    def __call__(self, model: nn.Module, microbatch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the summed loss of one micro-batch.

        Args:
            model: A transformers causal language model.
            microbatch: ``input_ids``, ``attention_mask`` and ``labels``, int64 [rows, length]; ``labels[r, t]`` is the
                token after ``input_ids[r, t]``, or -100 if it is not trained on. Or a row of
                `bigbatch.lm.model.packed_rows.pack_row`. With ``weights``, float32 [rows, length], each loss is
                multiplied by its weight, and the weights are counted instead of the labels.

        Returns:
            The 0-d sum in float32 (float64 for a float64 model), and the 0-d count of labels or sum of weights.
        """
        labels = microbatch["labels"]
        with self._device_spec.autocast():
            inputs = model_inputs(microbatch, longest=self._longest, needs_mask=self._needs_mask)
            logits = model(**inputs, use_cache=False).logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        weights = microbatch.get("weights")
        if weights is None:
            loss_sum = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        else:
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
            loss_sum = (losses * weights.flatten()).sum()
        return loss_sum, count_items(microbatch)


def count_items(microbatch: dict[str, Tensor]) -> Tensor:
    """Return the 0-d number of labels of a micro-batch or sample, or the sum of their weights if it has ``weights``.

    In float64, where the device has it: in float32 the sum would depend on how the batch is cut.
    """
    weights = microbatch.get("weights")
    if weights is None:
        return (microbatch["labels"] != IGNORED).sum()
    return weights.sum(dtype=torch.float32 if weights.device.type == "mps" else torch.float64)
