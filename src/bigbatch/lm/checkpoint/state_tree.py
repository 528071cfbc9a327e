"""State in a form that files can store: tensors separated from plain values, and joined again.

tree → values with a placeholder for each tensor, tensors by the path of the placeholder → tree
"""

import base64
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_TENSOR, _TUPLE, _PAIRS = "$tensor", "$tuple", "$pairs"
_SCALARS = frozenset({type(None), bool, int, float, str})


def split_tensors(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a tree of dictionaries, lists and tuples into values that JSON can store and tensors by path.

    Tuples and dictionaries with other keys than strings are marked, so that `join_tensors` restores them.

    Raises:
        TypeError: A leaf is neither a tensor nor None, a bool, a number or a string.
    """
    tensors: dict[str, Tensor] = {}
    return _values(tree, "", tensors), tensors


def _values(node: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if type(node) in _SCALARS:
        return node
    if isinstance(node, Tensor):
        while place in tensors:  # keys such as 1 and "1", or one that contains a slash
            place += "'"
        tensors[place] = node
        return {_TENSOR: place}
    if isinstance(node, Mapping):
        named = {key: _values(value, f"{place}/{key}", tensors) for key, value in node.items()}
        plain = all(isinstance(key, str) and not key.startswith("$") for key in named)
        return named if plain else {_PAIRS: [[key, value] for key, value in named.items()]}
    if isinstance(node, list | tuple):
        if _SCALARS.issuperset(map(type, node)):  # such as the 625 numbers of Python's random state
            values = list(node)
        else:
            values = [_values(value, f"{place}/{index}", tensors) for index, value in enumerate(node)]
        return values if isinstance(node, list) else {_TUPLE: values}
    if isinstance(node, int | float | str):  # a subclass, such as an enumeration
        return node
    raise TypeError(f"{place or 'the state'} is a {type(node).__name__}, which a checkpoint cannot hold.")


def join_tensors(values: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the tree that `split_tensors` split."""
    if isinstance(values, dict):
        if _TENSOR in values:
            return tensors[values[_TENSOR]]
        if _TUPLE in values:
            return tuple(join_tensors(values[_TUPLE], tensors))
        if _PAIRS in values:
            return {key: join_tensors(value, tensors) for key, value in values[_PAIRS]}
        return {key: join_tensors(value, tensors) for key, value in values.items()}
    if isinstance(values, list):
        if _SCALARS.issuperset(map(type, values)):
            return list(values)
        return [join_tensors(value, tensors) for value in values]
    return values


def copy_to_cpu(tree: Any) -> Any:
    """Return a tree with its tensors copied to the CPU, where later updates do not change them."""
    values, tensors = split_tensors(tree)
    return join_tensors(values, {place: t.detach().to("cpu", copy=True) for place, t in tensors.items()})


def to_message(tree: Any) -> Any:
    """Return a tree of plain values and small uint8 tensors, such as random states, as one JSON value."""
    values, tensors = split_tensors(tree)
    return [values, {place: base64.b85encode(bits(t).numpy().tobytes()).decode() for place, t in tensors.items()}]


def from_message(message: Any) -> Any:
    """Return the tree of `to_message`; its tensors are uint8 ``[bytes]`` on the CPU."""
    values, encoded = message
    tensors = {
        place: torch.frombuffer(bytearray(base64.b85decode(text)), dtype=torch.uint8) for place, text in encoded.items()
    }
    return join_tensors(values, tensors)


def equal(one: Any, other: Any) -> bool:
    """Return whether two trees are equal to the last bit."""
    (values, tensors), (others, theirs) = split_tensors(one), split_tensors(other)
    return (
        repr(values) == repr(others)
        and tensors.keys() == theirs.keys()
        and all(
            t.dtype == theirs[place].dtype and torch.equal(bits(t), bits(theirs[place])) for place, t in tensors.items()
        )
    )


def bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, uint8 ``[bytes]`` on the CPU."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
