"""Packed rows: the samples of a micro-batch concatenated in a single row, without padding between them.

samples → pack_row → input_ids, labels, position_ids, offsets → model, whose attention separates the sequences
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.batching.token_groups import round_up_row
from bigbatch.errors import first_line
from bigbatch.lm.data.dataset import IGNORED, weights_of
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.causal_attention import NAME, VARLEN_DTYPES
from bigbatch.lm.model.embedding_hook import embedded_tokens
from bigbatch.preserve import preserved
from bigbatch.verification.cut_gradients import narrowest_dtype
from bigbatch.verification.tolerances import coarser_dtype, tolerance_for

MIN_ROW_PLACES = 64  # sequences in the offsets of a row; more are rounded up to a power of two
LEAK_TOLERANCE = 0.1  # effect of a neighbour's tokens, relative to that of an own token: rounding
CHECKED_LENGTHS = (7, 5, 4)


def pack_row(
    samples: Sequence[dict[str, Tensor]],
    *,
    pad_id: int,
    longest: int,
    most: int | None = None,
    marks_padding: bool = False,
) -> dict[str, Tensor]:
    """Concatenate samples in one row, padded to a size of `token_groups.round_up_row` so that rows have few sizes.

    Args:
        samples: With ``input_ids`` and ``labels``, int64 ``[length]``, and possibly ``weights``; at least one.
        pad_id: Token that pads the row. The padding consists of separate sequences without labels, none longer than
            ``longest``: attention covers every token of a row.
        longest: Tokens of the longest sequence of all rows.
        most: Maximum tokens of the row, unless the samples alone exceed it.
        marks_padding: Whether to return an ``attention_mask`` too, for losses of tokens without labels.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids``, int64 ``[1, tokens]``; ``offsets``, int32 ``[n + 1]``, the
        starts of the sequences, then the size of the row, repeated as empty sequences until n is a power of two; if a
        sample has ``weights``, those too, as `bigbatch.lm.data.dataset.weights_of` returns them; and on request
        ``attention_mask``, int64 ``[1, tokens]``, 1 for tokens and 0 for padding, which the model is not given.

    Raises:
        ValueError: ``samples`` is empty.
    """
    if not samples:
        raise ValueError("there is no sample to pack. Pass at least one.")
    lengths = [len(sample["input_ids"]) for sample in samples]
    tokens = sum(lengths)
    size = round_up_row(tokens) if most is None else max(tokens, min(round_up_row(tokens), most))
    while (padding_length := min(longest, size - sum(lengths))) > 0:
        lengths.append(padding_length)
    padding = (0, size - tokens)
    ends = torch.tensor(lengths).cumsum(0)
    offsets = torch.full((_num_offsets(len(lengths)) + 1,), size, dtype=torch.int32)
    offsets[0] = 0
    offsets[1 : len(lengths) + 1] = ends
    starts = torch.repeat_interleave(ends - torch.tensor(lengths), torch.tensor(lengths))
    input_ids = torch.cat([sample["input_ids"] for sample in samples])
    labels = torch.cat([sample["labels"] for sample in samples])
    row = {
        "input_ids": nn.functional.pad(input_ids, padding, value=pad_id)[None],
        "labels": nn.functional.pad(labels, padding, value=IGNORED)[None],
        "position_ids": (torch.arange(size) - starts)[None],
        "offsets": offsets,
    }
    if (weights := weights_of(samples)) is not None:
        row["weights"] = nn.functional.pad(torch.cat(weights), padding)[None]
    if marks_padding:
        row["attention_mask"] = (torch.arange(size) < tokens).to(torch.int64)[None]
    return row


def _num_offsets(sequences: int) -> int:
    return max(MIN_ROW_PLACES, 1 << (sequences - 1).bit_length())


def model_inputs(microbatch: dict[str, Tensor], *, longest: int | None, needs_mask: bool) -> dict[str, Any]:
    """Return the keyword arguments of the model for a padded or packed micro-batch."""
    if "offsets" not in microbatch:
        names = ("input_ids", "attention_mask") if needs_mask else ("input_ids",)
        return {name: microbatch[name] for name in names}
    offsets = microbatch["offsets"]
    return {
        "input_ids": microbatch["input_ids"],
        "position_ids": microbatch["position_ids"],
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def static_packing_obstacle(model: Any, device_spec: DeviceSpec) -> str | None:
    """Return why a model cannot run packed rows, judged by its configuration and the device alone; None if it may."""
    if device_spec.device.type == "cuda" and not device_spec.is_half_precision:
        return f"attention has no kernel for packed rows in {device_spec.precision}"
    if device_spec.device.type not in ("cuda", "cpu"):
        return f"attention has no kernel for packed rows on {device_spec.device.type}"
    if getattr(model.config, "_attn_implementation", None) != NAME:
        return "the model uses its own attention implementation"
    if getattr(model.config, "attention_chunk_size", None) is not None:
        return "the model uses chunked attention"
    return None


def packing_obstacle(model: Any, device_spec: DeviceSpec, *, longest: int) -> str | None:
    """Return why a model cannot run packed rows, in a few words; None if it can.

        logits(packed row) = logits(each sequence alone)                                    within rounding
        ∂ logits of one sequence / ∂ embedded tokens of the others = 0                      exactly
        logits of one sequence do not depend on the tokens of the previous one              within rounding

    The gradient shows dependencies below rounding: a convolution over three tokens changes the logits by less than
    bfloat16 rounding does. Tested on the model, in evaluation mode and once in training mode. Training modes, random
    states and buffers are restored.

    Args:
        model: A transformers language model on its device, whose attention is that of `use_causal_attention`.
        device_spec: Decides about autocast. The tolerance is that of `verify` for the narrowest dtype in use, and at
            least that for float32.
        longest: Tokens of the longest sequence of all rows.
    """
    if (obstacle := static_packing_obstacle(model, device_spec)) is not None:
        return obstacle
    try:
        with preserved(model, parameters=False), narrowest_dtype(model) as dtypes, _recorded_windows() as windows:
            model.train()
            _logits(model, device_spec, longest, _samples(model, longest))  # attention with dropout may have no kernel
            model.eval()
            by_layout, by_neighbour, by_own = _changes(model, device_spec, longest)
            leaks = _leaks(model, device_spec, longest)
    except Exception as error:  # noqa: BLE001 - on any error, rows are padded instead
        return first_line(error)
    if 0 < (getattr(model.config, "sliding_window", None) or 0) < longest and not any(windows):
        return "its sliding window exists only as a mask"
    dtype = coarser_dtype(dtypes[-1], torch.float32)
    if device_spec.device.type == "cuda" and dtype not in VARLEN_DTYPES:
        dtype = torch.bfloat16
    if leaks or by_neighbour > LEAK_TOLERANCE * by_own:
        return "sequences in a packed row affect one another"
    tolerance = tolerance_for(dtype)
    return None if by_layout <= tolerance else f"its logits in a packed row differ by {by_layout:.0e}"


@contextmanager
def _recorded_windows() -> Iterator[list[int]]:
    """Collect the ``sliding_window`` arguments that layers pass to attention; windows in masks do not count."""
    from transformers import AttentionInterface

    attend, windows = AttentionInterface()[NAME], list[int]()

    def attend_and_record(module: Any, *tensors: Any, **options: Any) -> Any:
        windows.append(options.get("sliding_window") or 0)
        return attend(module, *tensors, **options)

    AttentionInterface.register(NAME, attend_and_record)
    try:
        yield windows
    finally:
        AttentionInterface.register(NAME, attend)


def _logits(model: Any, device_spec: DeviceSpec, longest: int, samples: Sequence[list[int]]) -> Tensor:
    """Return the logits of samples in one packed row, ``[tokens, vocabulary]``."""
    rows = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in samples]
    row = {name: tensor.to(device_spec.device) for name, tensor in pack_row(rows, pad_id=0, longest=longest).items()}
    with device_spec.autocast():
        logits: Tensor = model(**model_inputs(row, longest=longest, needs_mask=False), use_cache=False).logits
    return logits[0, : sum(map(len, samples))]


@torch.no_grad()
def _changes(model: Any, device_spec: DeviceSpec, longest: int) -> tuple[float, float, float]:
    """Return the change of logits by packing (relative), by a neighbour's tokens, and by an own token."""

    def logits(*samples: list[int]) -> Tensor:
        return _logits(model, device_spec, longest, samples).cpu().double()

    def alone(row: list[int]) -> Tensor:
        with device_spec.autocast():
            output: Tensor = model(input_ids=torch.tensor([row], device=device_spec.device), use_cache=False).logits
        return output[0].cpu().double()

    samples = _samples(model, longest)
    packed = logits(*samples)
    separate = torch.cat([alone(row) for row in samples])
    first, second, *others = samples
    part = slice(len(first), len(first) + len(second))
    by_neighbour = logits(first[::-1], second, *others)[part] - packed[part]
    by_own = logits(first, [*second[1:2], *second[1:]], *others)[part] - packed[part]
    return float((packed - separate).norm() / separate.norm()), float(by_neighbour.norm()), float(by_own.norm())


def _leaks(model: Any, device_spec: DeviceSpec, longest: int) -> bool:
    """Return whether the logits of one sequence have a nonzero gradient by the embedded tokens of others."""
    first, second, *others = _samples(model, longest)
    part = slice(len(first), len(first) + len(second))
    with embedded_tokens(model) as embedded:
        logits = _logits(model, device_spec, longest, [first, second, *others])[part].float()
        (gradient,) = torch.autograd.grad(logits.sum(), embedded[0])
    reached = gradient[0].abs().sum(-1) > 0  # [tokens]
    return bool(reached[: part.start].any() or reached[part.stop :].any() or not reached[part].any())


def _samples(model: Any, longest: int) -> list[list[int]]:
    """Create a few sequences of distinct tokens spread over the vocabulary."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    lengths = [min(length, longest) for length in CHECKED_LENGTHS]
    if longest < 2 or vocabulary <= sum(lengths):
        raise ValueError("the model has too few tokens or positions to test it")
    tokens = [1 + i * (vocabulary - 2) // sum(lengths) for i in range(sum(lengths))]
    return [[tokens.pop() for _ in range(length)] for length in lengths]
