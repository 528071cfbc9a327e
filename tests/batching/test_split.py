"""Cutting a batch: views in order, every sample once, and what cannot be cut says why."""

import collections

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.batching.split import split

CPU = torch.device("cpu")
Pair = collections.namedtuple("Pair", "left right")


def column(samples, *shape):
    return torch.arange(samples * max(1, torch.Size(shape).numel())).reshape(samples, *shape)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 30), st.integers(1, 40))
def test_every_sample_comes_once_in_requested_size(samples, size):
    parts = split(column(samples), size, device=CPU)
    taken = list(parts)
    assert len(parts) == len(taken) == -(-samples // size)
    assert torch.cat([*taken, column(0)]).tolist() == list(range(samples))
    assert all(len(part) == size for part in taken[:-1])
    assert parts.num_samples == samples


@pytest.mark.parametrize(
    "batch",
    [
        column(5),
        (column(5), column(5, 2)),
        [column(5), column(5, 2)],
        {"a": column(5), "b": {"c": [column(5, 2, 3), None]}},
        {"a": column(5), "temperature": torch.tensor(0.5)},
        Pair(column(5), column(5, 2)),
        collections.OrderedDict(a=column(5)),
    ],
)
def test_pytree_structure_is_kept(batch):
    parts = list(split(batch, 2, device=CPU))
    leaves = torch.utils._pytree.tree_leaves(batch)
    assert len(parts) == 3
    for index, part in enumerate(parts):
        for leaf, whole in zip(torch.utils._pytree.tree_leaves(part), leaves, strict=True):
            if whole is None or not whole.ndim:
                assert leaf is whole
            else:
                assert torch.equal(leaf, whole[2 * index : 2 * index + 2])
        assert isinstance(part, dict) or type(part) is type(batch)


def test_microbatches_are_views_not_copies():
    batch = column(6, 2)
    (first, _) = split(batch, 3, device=CPU)
    assert first.untyped_storage().data_ptr() == batch.untyped_storage().data_ptr()


def test_group_taken_again_is_a_fresh_view():
    inputs, labels = torch.rand(6, 2), torch.arange(6)
    parts = split((inputs, labels), 4, device=CPU)
    first, _ = parts.take(parts.groups[1])
    first.requires_grad_()
    again, again_labels = parts.take(parts.groups[1])
    assert not again.requires_grad
    assert torch.equal(again, inputs[4:])
    assert again_labels.tolist() == [4, 5]


def test_tokenizer_output_is_split_like_dict():
    transformers = pytest.importorskip("transformers")
    batch = transformers.BatchEncoding({"input_ids": column(5, 3), "attention_mask": column(5, 3)})
    parts = list(split(batch, 2, device=CPU))
    assert [part["input_ids"].tolist() for part in parts] == [part.tolist() for part in column(5, 3).split(2)]


def test_tokenizer_output_inside_tuple_is_split():
    transformers = pytest.importorskip("transformers")
    batch = (transformers.BatchEncoding({"input_ids": column(5, 3)}), column(5))
    parts = list(split(batch, 2, device=CPU))
    assert [part[0]["input_ids"].tolist() for part in parts] == [part.tolist() for part in column(5, 3).split(2)]


def test_sample_list_is_collated_one_microbatch_at_time():
    samples = ["a", "bb", "ccc", "dddd", "eeeee"]
    collated = []

    def collate(some):
        collated.append(some)
        return {"lengths": torch.tensor([len(sample) for sample in some]), "text": some}

    parts = split(samples, 2, device=CPU, collate=collate)
    assert not collated
    assert [part["lengths"].tolist() for part in parts] == [[1, 2], [3, 4], [5]]
    assert collated == [["a", "bb"], ["ccc", "dddd"], ["eeeee"]]


def test_no_samples_give_no_microbatch():
    assert list(split(column(0, 3), 2, device=CPU)) == []
    assert list(split([], 2, device=CPU, collate=torch.stack)) == []


def test_tensors_of_different_size_are_reported_with_sizes():
    with pytest.raises(
        ValueError, match=r"batch\['a'\] has 5, batch\['b'\]\[0\] has 4. Dimension 0 must be the sample"
    ):
        split({"a": column(5), "b": [column(4)]}, 2, device=CPU)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"text": ["a", "b"]}, r"batch\['text'\]\[0\] is a str, which cannot be split"),
        ("abc", "batch is a str, which cannot be split"),
        ({"n": 3}, r"batch\['n'\] is a int"),
        (object(), "batch is a object"),
        ({}, "the batch contains no tensor with a sample dimension"),
        (None, "the batch contains no tensor with a sample dimension"),
        (torch.tensor(1.0), "the batch contains no tensor with a sample dimension"),
        ((torch.tensor(1.0), None), "the batch contains no tensor with a sample dimension"),
    ],
)
def test_unsplittable_value_raises_type_error_naming_it(batch, message):
    with pytest.raises(TypeError, match=message):
        split(batch, 2, device=CPU)


def test_arrays_are_rejected_by_name():
    numpy = pytest.importorskip("numpy")
    with pytest.raises(TypeError, match=r"batch\['x'\] is a ndarray.*Pass tensors"):
        split({"x": numpy.zeros((4, 2))}, 2, device=CPU)


@pytest.mark.parametrize("batch", ["abc", iter([1, 2]), {"a": 1}, torch.ones(3)])
def test_collate_requires_list(batch):
    with pytest.raises(TypeError, match="with collate= the batch must be a list of samples, not a"):
        split(batch, 2, device=CPU, collate=list)


@pytest.mark.parametrize("microbatch", [0, -3])
def test_microbatch_of_zero_samples_is_rejected(microbatch):
    with pytest.raises(
        ValueError, match=f"microbatch is {microbatch}: it must be at least 1, the samples of one micro-batch"
    ):
        split(column(5), microbatch, device=CPU)


@pytest.mark.parametrize("microbatch", [True, 2.5, "2", None])
def test_non_integer_microbatch_is_rejected(microbatch):
    with pytest.raises(TypeError, match=f"microbatch is {microbatch!r}: it must be an int"):
        split(column(5), microbatch, device=CPU)
