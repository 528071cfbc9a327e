"""Check whether the logits of a model depend on right padding."""

from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.lm.device import DeviceSpec
from bigbatch.preserve import preserved
from bigbatch.verification.cut_gradients import narrowest_dtype
from bigbatch.verification.tolerances import coarser_dtype, tolerance_for

LENGTH = 12  # tokens of the test rows
NUM_TOKENS = 5  # of them before the padding
MARGIN = 4  # minimum ratio of the effect of a token on later logits to that of the padding on earlier ones


def ignores_right_padding(model: nn.Module, device_spec: DeviceSpec) -> bool:
    """Return whether a model can process right-padded rows without an attention mask.

        logits(tokens, padding)[:5] = logits(tokens)[:5]            within rounding, for two paddings, without a mask

    True for causal models; then neither the loss at the tokens nor its gradient depends on the padding. Tested on the
    model in evaluation mode, in two forwards of two rows of at most 12 tokens. Training modes, random states and
    buffers are restored.

    Args:
        model: A transformers language model, on its device.
        device_spec: Decides about autocast. The tolerance is that of `verify` for the narrowest dtype in use, and at
            least that for float32, in which some attention computes in every precision.

    Returns:
        False also if the test is inconclusive: the model requires a mask, has fewer than 12 positions or 9 tokens, or
        its tokens hardly affect the logits of one another.
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < LENGTH:
        return False  # an out-of-range position would leave the CUDA context of this process unusable
    try:
        with preserved(model, parameters=False), narrowest_dtype(model) as dtypes, device_spec.autocast():
            by_padding, by_token, size = _changes(model, device_spec.device)
    except Exception:  # noqa: BLE001 - on any error, the model keeps its mask
        return False
    dtype = coarser_dtype(dtypes[-1], torch.float32)
    tolerance = tolerance_for(dtype)
    conclusive = by_token > torch.finfo(dtype).eps * size
    return conclusive and by_padding <= min(tolerance * size, by_token / MARGIN)


@torch.no_grad()
def reference_logits(model: Any, device_spec: DeviceSpec) -> Tensor:
    """Compute the logits of a row of 5 tokens without a mask, float64 ``[5, vocabulary]`` on the CPU."""
    tokens = _distinct_tokens(model, NUM_TOKENS)
    with preserved(model, parameters=False), device_spec.autocast():
        model.eval()
        return _logits(model, [tokens], device_spec.device)[0]


@torch.no_grad()
def _changes(model: Any, device: torch.device) -> tuple[float, float, float]:
    """Return the change of logits by the padding after them and by a token before them, and their norm."""
    *tokens, other, first, second = _distinct_tokens(model, NUM_TOKENS + 3)
    position = NUM_TOKENS // 2
    changed = [*tokens[:position], other, *tokens[position + 1 :]]
    padding = LENGTH - NUM_TOKENS
    model.eval()
    short = _logits(model, [tokens, changed], device)
    padded = _logits(model, [tokens + padding * [first], tokens + padding * [second]], device)
    by_padding = max(_norm(row - short[0]) for row in padded)
    return by_padding, _norm(short[1, position + 1 :] - short[0, position + 1 :]), _norm(short[0])


def _distinct_tokens(model: Any, count: int) -> list[int]:
    """Choose tokens spread over the vocabulary; the last but one is the padding token, if the model has one."""
    rows = model.get_input_embeddings().weight.shape[0]
    if rows <= count:
        raise ValueError(f"the model has {rows} tokens, but {count + 1} are needed.")
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    tokens = [i * (rows - 1) // count for i in range(count + 1)]
    tokens = [token for token in tokens if token != pad][:count]
    if pad is not None:
        tokens[-2] = pad
    return tokens


def _logits(model: Any, rows: list[list[int]], device: torch.device) -> Tensor:
    """Return the logits at the first 5 tokens of each row, float64 ``[rows, 5, vocabulary]`` on the CPU."""
    logits: Tensor = model(input_ids=torch.tensor(rows, device=device), use_cache=False).logits
    return logits[:, :NUM_TOKENS].cpu().double()


def _norm(tensor: Tensor) -> float:
    return float(tensor.norm())
