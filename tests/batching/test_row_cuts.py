"""Rows of tensors along any dimension, of jagged and of sparse tensors: every sample once, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.batching.split import split, split_into

CPU = torch.device("cpu")


def jagged(*lengths):
    return torch.nested.nested_tensor(
        [torch.full((n, 2), float(i)) for i, n in enumerate(lengths)], layout=torch.jagged
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(0, 9), st.integers(1, 5))
def test_microbatches_join_to_batch_along_any_dimension(dim, samples, size):
    shape = [3, 2, 4, 5]
    shape[dim] = samples
    batch = {"x": torch.randn(shape), "scale": torch.tensor(2.0), "none": None}
    parts = list(split(batch, size, device=CPU, batch_dim=dim))
    assert len(parts) == -(-samples // size)
    assert all(part["scale"] is batch["scale"] and part["none"] is None for part in parts)
    if parts:
        assert torch.equal(torch.cat([part["x"] for part in parts], dim=dim), batch["x"])


def test_parts_along_other_dimension_are_contiguous():
    """The model may view a part as it views the batch."""
    batch = torch.randn(6, 4, 3)
    for groups in ([range(3), range(3, 4)], [[3, 0], [1, 2]]):
        for rows, part in zip(groups, split_into(batch, groups, device=CPU, batch_dim=1), strict=True):
            assert part.is_contiguous()
            assert torch.equal(part.view(-1, 3), batch[:, list(rows)].reshape(-1, 3))
    strided = torch.randn(4, 6, 3).transpose(0, 1)
    (part, *_) = split(strided, 3, device=CPU, batch_dim=1)
    assert part.untyped_storage().data_ptr() == strided.untyped_storage().data_ptr()


def test_jagged_rows_are_those_of_batch():
    whole = jagged(3, 1, 4, 2, 0)
    for groups in ([range(2), range(2, 5)], [[4, 2], [3], [0, 1]]):
        for rows, part in zip(groups, split_into({"x": whole}, groups, device=CPU), strict=True):
            assert part["x"].layout is torch.jagged
            expected = [whole.unbind()[row] for row in rows]
            assert all(torch.equal(a, b) for a, b in zip(part["x"].unbind(), expected, strict=True))


def test_jagged_tensors_with_gaps_are_split():
    whole = torch.nested.narrow(
        torch.arange(20.0).view(4, 5), 1, torch.tensor([1, 0, 2, 3]), torch.tensor([2, 4, 1, 2]), torch.jagged
    )
    parts = split((whole, torch.arange(4)), 3, device=CPU)
    rows = [row.tolist() for part, _ in parts for row in part.unbind()]
    assert rows == [row.tolist() for row in whole.unbind()]
    assert [len(row) for row in rows] == [2, 4, 1, 2]


def test_jagged_tensors_of_same_lengths_stay_compatible():
    values, offsets = torch.randn(7, 2), torch.tensor([0, 2, 3, 7])
    x, y = (torch.nested.nested_tensor_from_jagged(values * scale, offsets) for scale in (1, 2))
    for part in split((x, y, jagged(1, 1, 1)), 2, device=CPU):
        assert torch.equal((part[0] * part[1]).values(), 2 * part[0].values() ** 2)


def test_jagged_gradient_is_sum_of_parts():
    whole, weight = jagged(2, 5, 1, 3).double(), torch.randn(2, dtype=torch.float64, requires_grad=True)

    def loss(x):
        return (x * weight).values().square().sum()

    (expected,) = torch.autograd.grad(loss(whole), weight)
    found = sum(torch.autograd.grad(loss(part), weight)[0] for part in split(whole, 3, device=CPU))
    assert torch.allclose(found, expected, rtol=1e-12)


def test_ragged_dimension_behind_another_is_refused():
    whole = torch.nested.nested_tensor([torch.ones(n, 2) for n in (2, 3)], layout=torch.jagged).transpose(1, 2)
    with pytest.raises(TypeError) as caught:
        split({"x": whole}, 1, device=CPU)
    assert str(caught.value) == (
        "batch['x'] is a jagged tensor that is split along dimension 0 and ragged along 2. Pass [samples, ragged, "
        "...], without batch_dim=."
    )
    with pytest.raises(TypeError, match="split along dimension 1 and ragged along 1"):
        split(jagged(2, 3), 1, device=CPU, batch_dim=1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensor_without_offsets_is_refused():
    with pytest.raises(TypeError) as caught:
        split((torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),), 1, device=CPU)
    assert str(caught.value) == "batch[0] is a nested tensor without offsets. Build it with layout=torch.jagged."


@pytest.mark.parametrize("dim", [0, 1])
def test_sparse_rows_are_those_of_dense(dim):
    dense = torch.tensor([[0.0, 2, 0, 1], [3, 0, 0, 0], [0, 0, 0, 0], [0, 4, 5, 0]])
    for groups in ([range(3), range(3, 4)], [[3, 1], [0, 2]]):
        parts = split_into((dense.to_sparse(), dense), groups, device=CPU, batch_dim=dim)
        for sparse, rows in parts:
            assert sparse.is_sparse
            assert torch.equal(sparse.to_dense(), rows)
