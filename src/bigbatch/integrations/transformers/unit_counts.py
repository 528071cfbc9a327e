"""Count the items of a collated micro-batch in every unit that a loss may be averaged over.

collated micro-batch → shifted labels, labels, tokens of each mask, samples, positions
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

IGNORED = -100  # the label that losses of transformers leave out
_MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")
_TOKENS_OF_MASK = {"completion_mask": "completion tokens", "attention_mask": "attention tokens"}

Count: TypeAlias = Callable[[Any], int | Tensor]
"""Items of one collated micro-batch: an int, or a 0-d tensor on its device, which is not waited for."""


@dataclass(frozen=True)
class Candidate:
    """A unit that a loss may be averaged over.

    Attributes:
        name: Such as ``"shifted labels"``.
        count: Counts the items of a micro-batch.
        count_rows: Counts those of each row of its tensors, ``[rows]``; None if rows cannot be counted.
        counts_labels: Whether the items are labels that are not ignored.
        depends_on_padding: Whether the count of a sample depends on the samples that it is collated with.
    """

    name: str
    count: Count
    count_rows: Callable[[Any], Tensor] | None = None
    counts_labels: bool = False
    depends_on_padding: bool = False


def candidates_for(inputs: Any, *, num_samples: int, label_names: Sequence[str] = ()) -> list[Candidate]:
    """Return the units in which a micro-batch can be counted, the most usual ones first.

    Args:
        inputs: A collated micro-batch.
        num_samples: Samples that it was collated from.
        label_names: Names of labels, in addition to ``"labels"``.
    """
    found = [*_of_labels(inputs, label_names), *_of_mask(inputs, "completion_mask")]
    samples = _samples(inputs, num_samples)
    found += [samples] if samples is not None else []
    found += _of_mask(inputs, "attention_mask")
    masks = [key for key, value in _items(inputs) if key.endswith("mask") and _is_integral(value)]
    for key in masks:
        found += [] if key in _TOKENS_OF_MASK else _of_mask(inputs, key)
    if _num_positions(inputs):
        found.append(Candidate("positions", _num_positions, depends_on_padding=True))
    if _num_positions(inputs, start=1):
        shifted = partial(_num_positions, start=1)
        found.append(Candidate("shifted positions", shifted, depends_on_padding=True))
    return found


def num_rows(inputs: Any) -> int:
    """Return the size of the first dimension of the main tensor of a micro-batch; 0 if it has no tensor."""
    main = _main_tensor(inputs)
    return 0 if main is None else main.shape[0]


def cut_rows(inputs: Any, rows: Sequence[int]) -> Any:
    """Return some rows of a micro-batch: of every tensor and list whose length is its number of rows."""
    total = num_rows(inputs)
    index = torch.tensor(rows)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == total:
            return value[index.to(value.device)]
        return value

    def cut_column(value: Any) -> Any:
        if isinstance(value, list) and len(value) == total:
            return [value[row] for row in rows]
        return tree_map(cut, value)

    if isinstance(inputs, Mapping):
        return {key: cut_column(value) for key, value in inputs.items()}
    return tree_map(cut, inputs)


def has_row_for_each_sample(inputs: Any, num_samples: int) -> bool:
    """Return whether every tensor of a micro-batch has one row for each sample."""
    tensors = [leaf for leaf in tree_leaves(_plain(inputs)) if isinstance(leaf, Tensor) and leaf.ndim]
    return bool(tensors) and all(tensor.shape[0] == num_samples for tensor in tensors)


def _of_labels(inputs: Any, label_names: Sequence[str]) -> Iterator[Candidate]:
    values = dict(_items(inputs))
    if _is_integral(values.get("shift_labels")):
        yield _labels("shifted labels", "shift_labels")
    for key in dict.fromkeys(["labels", *label_names]):
        labels = values.get(key)
        if labels is None or not _is_integral(labels):
            continue
        if labels.ndim > 1 and labels.shape[-1] > 1 and "shift_labels" not in values:
            name = "shifted labels" if key == "labels" else f"shifted {key}"
            yield _labels(name, key, start=1)
        yield _labels(key, key)


def _labels(name: str, key: str, start: int = 0) -> Candidate:
    def valid(inputs: Any) -> Tensor:
        labels: Tensor = inputs[key]
        return (labels[..., start:] if start else labels).ne(IGNORED)

    return _of_marks(name, valid, counts_labels=True)


def _of_marks(name: str, marks: Callable[[Any], Tensor], *, counts_labels: bool = False) -> Candidate:
    """Return a unit of elements that are marked in a bool tensor ``[rows, ...]``."""

    def count(inputs: Any) -> Tensor:
        return marks(inputs).sum()

    def count_rows(inputs: Any) -> Tensor:
        found = marks(inputs)
        return found.reshape(found.shape[0], -1).sum(dim=1)

    return Candidate(name, count, count_rows, counts_labels=counts_labels)


def _of_mask(inputs: Any, key: str) -> Iterator[Candidate]:
    mask = dict(_items(inputs)).get(key)
    if mask is None or not _is_integral(mask):
        return
    name = _TOKENS_OF_MASK.get(key, key)
    yield _of_marks(name, lambda inputs: inputs[key].ne(0))
    if mask.ndim == 2:
        yield _of_marks(f"shifted {name}", lambda inputs: inputs[key][..., 1:].ne(0))


def _samples(inputs: Any, num_samples: int) -> Candidate | None:
    """Return the unit of samples; None if their number cannot be seen from a micro-batch."""
    rows = num_rows(inputs)
    if rows and num_samples and rows % num_samples == 0 and not (rows == 1 and _is_packed(inputs)):
        each = rows // num_samples  # two for pairs
        return Candidate(
            "samples",
            lambda inputs: num_rows(inputs) // each,
            (lambda inputs: torch.ones(num_rows(inputs), dtype=torch.int64)) if each == 1 else None,
        )
    if isinstance(inputs, Mapping) and "position_ids" in inputs:  # one row, in which each sample starts from 0
        return Candidate("samples", lambda inputs: inputs["position_ids"].eq(0).sum())
    return None


def _is_packed(inputs: Any) -> bool:
    return isinstance(inputs, Mapping) and "position_ids" in inputs and "attention_mask" not in inputs


def _num_positions(inputs: Any, start: int = 0) -> int:
    """Return rows times length, of the length from an index on."""
    values = dict(_items(inputs))
    names = [*_MAIN_INPUTS, "labels"]
    tensors = [values[name] for name in names if isinstance(values.get(name), Tensor)]
    tensor = next((each for each in tensors if each.ndim > 1), None)
    if tensor is None:
        leaves = [leaf for leaf in tree_leaves(_plain(inputs)) if isinstance(leaf, Tensor)]
        tensor = next((leaf for leaf in leaves if leaf.ndim > 1), None)
    return 0 if tensor is None else tensor.shape[0] * (tensor.shape[1] - start)


def _main_tensor(inputs: Any) -> Tensor | None:
    values = dict(_items(inputs))
    named = [values[name] for name in _MAIN_INPUTS if isinstance(values.get(name), Tensor)]
    leaves = [leaf for leaf in tree_leaves(_plain(inputs)) if isinstance(leaf, Tensor) and leaf.ndim]
    return next(iter([*named, *leaves]), None)


def _items(inputs: Any) -> list[tuple[str, Any]]:
    return [(str(key), value) for key, value in inputs.items()] if isinstance(inputs, Mapping) else []


def _plain(inputs: Any) -> Any:
    """Return a mapping as a dict, which torch's pytrees can look into."""
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


def _is_integral(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex() and value.ndim > 0
