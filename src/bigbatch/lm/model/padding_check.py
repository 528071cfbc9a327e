"""Right padding: whether what a model says at the tokens depends on what stands after them."""

from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.lm.device import DeviceSpec
from bigbatch.preserve import preserved
from bigbatch.verification.cut_gradients import narrowest_dtype
from bigbatch.verification.tolerances import coarser_dtype, tolerance_for

LENGTH = 12  # of the rows that are tried
NUM_TOKENS = 5  # of them; the rest is filled
MARGIN = 4  # by which a token must change the logits after it more than the filling changes those before


def ignores_right_padding(model: nn.Module, device_spec: DeviceSpec) -> bool:
    """Tell whether right-padded rows may go into a model without an attention mask.

        logits(tokens, filling)[:5] = logits(tokens)[:5]            within rounding, for two fillings, without a mask

    It holds for causal models, and means that no loss at the tokens, nor its gradient, depends on the padding. Tried on
    the model itself in evaluation mode, in two forwards of two rows of at most 12 tokens. Training modes, random states
    and buffers are put back.

    Args:
        model: A transformers language model, on its device.
        device_spec: Decides about autocast. The tolerance is that of `verify` for the narrowest dtype in use, and at
            least that for float32, in which some attention computes whatever the model is in.

    Returns:
        False also where it cannot be told: the model wants a mask, has fewer than 12 positions or 9 tokens, or its
        tokens hardly change the logits of each other.
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < LENGTH:
        return False  # a CUDA device that is asked for a position too many is lost to this process
    try:
        with preserved(model, parameters=False), narrowest_dtype(model) as dtypes, device_spec.autocast():
            by_filling, by_token, size = _changes(model, device_spec.device)
    except Exception:  # noqa: BLE001 - whatever a model says to rows without a mask, it wants one
        return False
    dtype = coarser_dtype(dtypes[-1], torch.float32)
    tolerance = tolerance_for(dtype)
    can_be_told = by_token > torch.finfo(dtype).eps * size
    return can_be_told and by_filling <= min(tolerance * size, by_token / MARGIN)


@torch.no_grad()
def reference_logits(model: Any, device_spec: DeviceSpec) -> Tensor:
    """Compute what a model says to a row of 5 tokens without a mask, float64 ``[5, vocabulary]`` on the CPU."""
    tokens = _distinct_tokens(model, NUM_TOKENS)
    with preserved(model, parameters=False), device_spec.autocast():
        model.eval()
        return _logits(model, [tokens], device_spec.device)[0]


@torch.no_grad()
def _changes(model: Any, device: torch.device) -> tuple[float, float, float]:
    """Measure how far a filling moves the logits before it, how far a token those after it, and how large they are."""
    *tokens, other, first, second = _distinct_tokens(model, NUM_TOKENS + 3)
    place = NUM_TOKENS // 2
    changed = [*tokens[:place], other, *tokens[place + 1 :]]
    padding = LENGTH - NUM_TOKENS
    model.eval()
    short = _logits(model, [tokens, changed], device)
    filled = _logits(model, [tokens + padding * [first], tokens + padding * [second]], device)
    by_filling = max(_norm(row - short[0]) for row in filled)
    return by_filling, _norm(short[1, place + 1 :] - short[0, place + 1 :]), _norm(short[0])


def _distinct_tokens(model: Any, count: int) -> list[int]:
    """Choose tokens from all over the vocabulary; the last but one is that of padding, where the model has one."""
    rows = model.get_input_embeddings().weight.shape[0]
    if rows <= count:
        raise ValueError(f"the model has {rows} tokens, and {count + 1} are needed.")
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    tokens = [i * (rows - 1) // count for i in range(count + 1)]
    tokens = [token for token in tokens if token != pad][:count]
    if pad is not None:
        tokens[-2] = pad
    return tokens


def _logits(model: Any, rows: list[list[int]], device: torch.device) -> Tensor:
    """Give the logits at the first tokens of each row, float64 ``[rows, 5, vocabulary]`` on the CPU."""
    logits: Tensor = model(input_ids=torch.tensor(rows, device=device), use_cache=False).logits
    return logits[:, :NUM_TOKENS].cpu().double()


def _norm(tensor: Tensor) -> float:
    return float(tensor.norm())
