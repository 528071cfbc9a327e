"""Numbers that a mean over a micro-batch may divide by: samples, tokens, labels, shifted labels, masks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bigbatch.verification.cut_gradients import CutGradients

IGNORED = (-100, -1, 0)  # label values that losses commonly leave out


class Count(NamedTuple):
    """A way to count, as an expression of the micro-batch, and its value in each group of samples."""

    expression: str
    values: list[float]


def candidate_counts(cut_gradients: CutGradients, groups: Sequence[Sequence[int]]) -> list[Count]:
    """Return counts of the micro-batches of some groups of samples, the more common ones first."""
    microbatches = list(cut_gradients.split(groups))
    counts = [Count("the samples", [float(len(group)) for group in groups])]
    first = dict(_tensors(microbatches[0]))
    others = [dict(_tensors(microbatch)) for microbatch in microbatches[1:]]
    for name, tensor in first.items():
        tensors = [tensor, *(other[name] for other in others if name in other)]
        if len(tensors) < len(microbatches):
            continue
        counts += _counts(name, tensors)
    return counts


def _counts(name: str, tensors: Sequence[Tensor]) -> Iterator[Count]:
    """Yield counts of the same tensor of several micro-batches: whole, and without its first or last position."""
    views = [(name, tensors)] if tensors[0].ndim else []
    if all(tensor.ndim >= 2 and tensor.shape[1] > 1 for tensor in tensors):
        views.append((f"{name}[:, 1:]", [tensor[:, 1:] for tensor in tensors]))
        views.append((f"{name}[:, :-1]", [tensor[:, :-1] for tensor in tensors]))
    for view, parts in views:
        if parts[0].is_floating_point() or parts[0].dtype is torch.bool:
            yield Count(f"{view}.sum()", [float(part.sum()) for part in parts])
        else:
            for ignored in IGNORED:
                yield Count(f"({view} != {ignored}).sum()", [float((part != ignored).sum()) for part in parts])
        yield Count(f"{view}.numel()", [float(part.numel()) for part in parts])


def _tensors(microbatch: Any) -> Iterator[tuple[str, Tensor]]:
    for path, leaf in pytree.tree_flatten_with_path(microbatch)[0]:
        name = "microbatch" + pytree.keystr(path)
        if isinstance(leaf, Tensor):
            yield name, leaf
        elif isinstance(leaf, Mapping):  # a mapping that is no pytree node
            yield from ((f"{name}[{key!r}]", value) for key, value in leaf.items() if isinstance(value, Tensor))
