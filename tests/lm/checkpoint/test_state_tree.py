"""State as files can hold it: what is taken apart comes back as it was."""

import json
import math
from enum import IntEnum
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.lm.checkpoint.json_values import to_json
from bigbatch.lm.checkpoint.state_tree import copy_to_cpu, equal, join_tensors, split_tensors

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    | st.builds(torch.tensor, st.lists(st.integers(-9, 9), max_size=3))
)
KEYS = st.text("ab/$", max_size=3) | st.integers(0, 3) | st.sampled_from(["0", "1", "$tensor", "$tuple", "$pairs"])
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    """As `equal`, told apart by hand: types, keys and their order, tensors and values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@given(TREES)
@settings(deadline=None)
def test_split_state_round_trips_through_json(tree: Any) -> None:
    values, tensors = split_tensors(tree)
    back = join_tensors(json.loads(to_json("tree", values)), tensors)
    assert same(back, tree)
    assert equal(back, tree)


def test_similar_paths_are_kept_distinct() -> None:
    tree = {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}, "c": {1: torch.tensor(3), "1": torch.tensor(4)}}
    values, tensors = split_tensors(tree)
    assert len(tensors) == 4
    assert same(join_tensors(values, tensors), tree)


def test_nonfinite_numbers_round_trip() -> None:
    values, tensors = split_tensors([math.inf, -math.inf, math.nan])
    up, down, none = join_tensors(json.loads(to_json("tree", values)), tensors)
    assert (up, down) == (math.inf, -math.inf)
    assert math.isnan(none)


class Level(IntEnum):
    LOW = 1


@pytest.mark.parametrize("kind", [list, tuple])
def test_numbers_beside_other_leaves_keep_their_order(kind: type) -> None:
    numbers = kind(range(625))
    tree = {"alone": numbers, "mixed": kind([*numbers, torch.tensor(1.0)]), "named": kind([Level.LOW, 2])}
    values, tensors = split_tensors(tree)
    assert same(join_tensors(values, tensors), tree)
    assert list(tensors) == ["/mixed/625"]
    joined = join_tensors(values, tensors)
    assert joined["alone"] is not numbers or kind is tuple, "a later change of one changes no other"


def test_unsupported_json_value_is_rejected_with_its_path() -> None:
    with pytest.raises(TypeError, match=r"^/a/1 is a set, which a checkpoint cannot hold\.$"):
        split_tensors({"a": [1, {2}]})
    with pytest.raises(TypeError, match=r"^the state is a object, which a checkpoint cannot hold\.$"):
        split_tensors(object())


def test_copies_are_independent() -> None:
    tensor = torch.zeros(3)
    copied = copy_to_cpu({"t": (tensor,)})
    tensor.add_(1)
    assert torch.equal(copied["t"][0], torch.zeros(3))


def test_equal_compares_every_bit() -> None:
    assert equal({"t": torch.tensor([0.0])}, {"t": torch.tensor([0.0])})
    assert not equal({"t": torch.tensor([0.0])}, {"t": torch.tensor([-0.0])})
    assert not equal({"t": torch.tensor([0.0])}, {"t": torch.tensor([0.0], dtype=torch.float64)})
    assert not equal({"t": torch.tensor([0.0])}, {"u": torch.tensor([0.0])})
    assert not equal([1], (1,))
    assert not equal([1], [1.0])
    assert equal([math.nan], [math.nan])
