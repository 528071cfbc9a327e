"""The metrics that the losses of TRL append once a micro-batch: one value a window, over all ranks.

Inside a window ``accelerator.gather`` and its relatives return this rank's values, so ranks may run different numbers
of micro-batches, of different sizes. At the end of the window the values are averaged over micro-batches and ranks,
weighted by items: exact for metrics that are means over the items of the loss, such as the rewards of DPO or the
entropy of SFT. Those named ``min_...`` and ``max_...`` are the minimum and maximum.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from bigbatch.integrations.transformers.samples import Piece, Pieces

_GATHERS = ("gather", "gather_for_metrics", "reduce", "pad_across_processes")
_NUM_TOKENS = "num_tokens"  # a total, assigned and not appended
_COUNTER = "_total_train_tokens"


def _unchanged(tensor: Any, *_: Any, **__: Any) -> Any:
    return tensor


@contextmanager
def local_gathers(accelerator: Any) -> Iterator[None]:
    """Make ``gather*``, ``reduce`` and ``pad_across_processes`` of an accelerator return the values of this rank."""
    if accelerator.num_processes == 1:
        yield
        return
    attributes = vars(accelerator)
    found = {name: attributes[name] for name in _GATHERS if name in attributes}
    attributes.update(dict.fromkeys(_GATHERS, _unchanged))
    try:
        yield
    finally:
        for name in _GATHERS:
            attributes.pop(name, None)
        attributes.update(found)


@contextmanager
def recorded(trainer: Any, piece: Piece) -> Iterator[None]:
    """Move what the loss of a micro-batch adds to the training metrics of a trainer to its piece."""
    lists = _lists(trainer)
    if lists is None:
        yield
        return
    lengths = {name: len(values) for name, values in lists.items()}
    counted = getattr(trainer, _COUNTER, 0)
    try:
        yield
    finally:
        piece.metrics = {}
        for name in list(lists):
            if name != _NUM_TOKENS:
                start = lengths.get(name, 0)
                piece.metrics[name] = lists[name][start:]
                del lists[name][start:]
            if name not in lengths:  # an empty list cannot be averaged
                del lists[name]
        piece.train_tokens = getattr(trainer, _COUNTER, 0) - counted
        if piece.train_tokens:
            setattr(trainer, _COUNTER, counted)


def complete(trainer: Any, pieces: Pieces) -> None:
    """Append the metrics of a window, over all ranks. Collective for trainers with such metrics."""
    lists = _lists(trainer)
    if lists is None:
        return
    local = _totals(pieces), sum(piece.train_tokens for piece in pieces)
    ranks = [local]
    if trainer.accelerator.num_processes > 1:
        ranks = [local] * trainer.accelerator.num_processes
        dist.all_gather_object(ranks, local)
    for name in dict.fromkeys(name for totals, _ in ranks for name in totals):
        value = _merged(name, [totals[name] for totals, _ in ranks if name in totals])
        if value is not None:
            lists.setdefault(name, []).append(value)
    if hasattr(trainer, _COUNTER):
        setattr(trainer, _COUNTER, getattr(trainer, _COUNTER) + sum(tokens for _, tokens in ranks))
        lists[_NUM_TOKENS] = [getattr(trainer, _COUNTER)]


def _lists(trainer: Any) -> dict[str, list[float]] | None:
    metrics = getattr(trainer, "_metrics", None)
    train = metrics.get("train") if isinstance(metrics, dict) else None
    return train if isinstance(train, dict) and all(isinstance(values, list) for values in train.values()) else None


def _totals(pieces: Pieces) -> dict[str, tuple[float, float, float, float]]:
    """Return Σ weight · value, Σ weight, minimum and maximum of each metric."""
    totals: dict[str, tuple[float, float, float, float]] = {}
    for piece in pieces:
        for name, values in piece.metrics.items():
            for value in map(float, values):
                weight = float(piece.items) / len(values)
                total, weights, least, most = totals.get(name, (0.0, 0.0, value, value))
                added = weight * value if weight else 0.0
                totals[name] = total + added, weights + weight, min(least, value), max(most, value)
    return totals


def _merged(name: str, parts: list[tuple[float, float, float, float]]) -> float | None:
    if name.startswith("min_"):
        return min(least for _, _, least, _ in parts)
    if name.startswith("max_"):
        return max(most for *_, most in parts)
    weight = sum(part[1] for part in parts)
    return sum(part[0] for part in parts) / weight if weight else None
