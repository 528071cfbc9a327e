"""Find what cannot be split in a batch, and what can be read in two ways: as samples, or as fields of all samples."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bigbatch.batching.batch_types import children, is_dataclass, is_packed
from bigbatch.batching.checks import check_functions

MOST_FIELDS = 4  # tensors of one kind in a list that are fields, as torch's DataLoader returns [inputs, labels]
MOST_NAMED = 4  # tensors that a message names


def check_batch_dim(batch_dim: int | None, collate: object) -> None:
    """Validate batch_dim= together with collate=.

    Raises:
        TypeError: It is not an int, or ``collate`` cannot be called.
        ValueError: It is negative, or there is a collate=, which receives the samples themselves.
    """
    check_functions(collate=collate)
    if batch_dim is None:
        return
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int):
        raise TypeError(f"batch_dim is {batch_dim!r}: it must be an int, the dimension of tensors that is the sample.")
    if batch_dim < 0:
        raise ValueError(
            f"batch_dim is {batch_dim}: it must be at least 0. Count the dimension that is the sample from the front, "
            "such as 1 for tensors [time, batch, ...]."
        )
    if collate is not None:
        raise ValueError(
            f"batch_dim={batch_dim} cuts tensors, and collate= builds micro-batches from a list of samples: leave "
            "batch_dim= out."
        )


def samples_of(batch: Any, dim: int, known_fields: set[tuple[str, int]]) -> int:
    """Count the samples of a batch, and raise if it can be read in two ways or cannot be split.

    Args:
        batch: As for `bigbatch.batching.split.split`.
        dim: The dimension that is the sample.
        known_fields: Name and length of lists that were fields in earlier batches, whose number of samples was another:
            they are fields in a batch of as many samples, too. Those of this batch are added.

    Raises:
        TypeError: A value cannot be split, or no tensor has a sample dimension.
        ValueError: Tensors disagree on the number of samples, or a list may be samples or fields.
    """
    named = list(_named_leaves(batch, "batch"))
    fields = _check_lists(batch, "batch", named, dim, known_fields)
    for name, leaf in named:
        _check_leaf(name, leaf, dim)
    counts = {name: leaf.size(dim) for name, leaf in named if leaf is not None and leaf.ndim}
    if not counts:
        raise TypeError("the batch contains no tensor with a sample dimension: pass tensors, or a list with collate=.")
    if len(set(counts.values())) > 1:
        raise ValueError(_disagreement(counts, dict(named), dim))
    known_fields.update(fields)
    return int(next(iter(counts.values())))


def _named_leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    found = children(value)
    if found is None:
        yield name, value
    for selector, child in found or ():
        yield from _named_leaves(child, name + selector)


def _check_leaf(name: str, leaf: Any, dim: int) -> None:
    if leaf is None:
        return
    if not isinstance(leaf, Tensor):
        raise TypeError(f"{name} is a {type(leaf).__name__}, which cannot be split into micro-batches. {_advice(leaf)}")
    if leaf.is_nested:
        if leaf.layout is not torch.jagged:
            raise TypeError(f"{name} is a nested tensor without offsets. Build it with layout=torch.jagged.")
        if dim or leaf._ragged_idx != 1:  # type: ignore[attr-defined]
            raise TypeError(
                f"{name} is a jagged tensor that is split along dimension {dim} and ragged along "
                f"{leaf._ragged_idx}. Pass [samples, ragged, ...], without batch_dim=."  # type: ignore[attr-defined]
            )
    elif leaf.layout not in (torch.strided, torch.sparse_coo):
        raise TypeError(f"{name} has the layout {leaf.layout}, which cannot be split. Pass {name}.to_sparse_coo().")
    if 0 < leaf.ndim <= dim:
        new = ", ".join(["None"] * (dim + 1 - leaf.ndim))
        raise ValueError(
            f"{name} has shape {list(leaf.shape)}, and batch_dim={dim} is the sample in every tensor. Pass it with "
            f"that dimension, such as {name}[{new}]."
        )


def _advice(leaf: Any) -> str:
    if is_packed(leaf):
        return "Pass the list of sequences with collate=torch.nn.utils.rnn.pack_sequence."
    if hasattr(leaf, "__array__"):
        return "Pass tensors: torch.as_tensor() converts it."
    if isinstance(leaf, int | float | complex):
        return (
            "Pass a number that holds for every sample as a 0-d tensor, which each micro-batch receives unchanged, and "
            "a number of the whole batch not at all."
        )
    return "Pass tensors whose dimension 0 is the sample, or a list of samples with collate=."


def _disagreement(counts: dict[str, int], leaves: Mapping[str, Any], dim: int) -> str:
    one_of_each = {count: name for name, count in reversed(counts.items())}
    shown = [name for name in counts if one_of_each[counts[name]] == name][:MOST_NAMED]
    listed = ", ".join(f"{name} has {counts[name]}" for name in shown)
    left_out = len(counts) - len(shown)
    if left_out:
        listed += f" ({left_out} more tensors)" if left_out > 1 else " (1 more tensor)"
    first = f"the tensors of the batch disagree on the number of samples: {listed}. "
    number = max(counts.values())
    if set(counts.values()) == {1, number}:
        name = one_of_each[1]
        sizes = ", ".join(str(number if d == dim else -1) for d in range(leaves[name].ndim))
        return first + f"Expand what all samples share, such as {name}.expand({sizes})."
    return first + (
        f"Dimension {dim} must be the sample in every one of them; pass batch_dim= for another dimension, or a list of "
        "samples with collate=."
    )


def _check_lists(
    value: Any, name: str, named: list[tuple[str, Any]], dim: int, known_fields: set[tuple[str, int]]
) -> set[tuple[str, int]]:
    """Return the lists in a batch that are fields by their length; raise if one may be samples or fields."""
    fields: set[tuple[str, int]] = set()
    for selector, child in children(value) or ():
        fields |= _check_lists(child, name + selector, named, dim, known_fields)
    if not isinstance(value, list) or len(value) < 2 or (element := _common_kind(value)) is None:
        return fields
    inside = {id(leaf) for _, leaf in _named_leaves(value, name)}
    outside = [leaf for _, leaf in named if isinstance(leaf, Tensor) and leaf.ndim > dim and id(leaf) not in inside]
    if outside:
        is_ambiguous = len(value) in {leaf.size(dim) for leaf in outside}
        fields |= set() if is_ambiguous else {(name, len(value))}
        why = f"as many as there are samples: it can be read as one {element} for each sample"
    else:
        is_ambiguous = len(value) > (MOST_FIELDS if element in ("tensor", "list") else 1)
        why = f"which can be read as {len(value)} samples"
    if is_ambiguous and (name, len(value)) not in known_fields:
        raise ValueError(
            f"{name} is a list of {len(value)} {element}s, {why}, or as {len(value)} fields of every sample. Pass a "
            f"list of samples with collate= for the first, or {name} as a tuple for the second."
        )
    return fields


def _common_kind(elements: list[Any]) -> str | None:
    """Return what all elements of a list are, if they are similar enough to be samples; None if not."""
    first = elements[0]
    if isinstance(first, Tensor):
        kinds = {(e.ndim, e.dtype) if isinstance(e, Tensor) else None for e in elements}
        return "tensor" if len(kinds) == 1 else None
    if isinstance(first, Mapping):
        same = all(isinstance(e, Mapping) and e.keys() == first.keys() for e in elements)
        return _noun(first) if same else None
    if is_dataclass(first):
        return _noun(first) if all(type(e) is type(first) for e in elements) else None
    if isinstance(first, list | tuple) and first:
        same = all(type(e) is type(first) and len(e) == len(first) for e in elements)
        return _noun(first) if same and (isinstance(first, tuple) or _are_uniform(elements)) else None
    return None


def _noun(element: Any) -> str:
    kind = type(element)
    return kind.__name__ if kind in (dict, list, tuple) else f"{kind.__name__} object"


def _are_uniform(lists: list[list[Any]]) -> bool:
    """Return whether tensors at the same places of lists have the same dtype and number of dimensions."""
    described = [[(e.ndim, e.dtype) if isinstance(e, Tensor) else type(e) for e in elements] for elements in lists]
    return all(each == described[0] for each in described)
