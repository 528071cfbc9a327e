"""Gradient sums: where they live, what they leave alone, what is left when they are gone."""

import pytest
import torch
from torch import nn

from bigbatch.gradients.gradient_sums import GradientSums
from support import full_batch_reference as ref


def linear(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Linear(3, 2).to(dtype)


def inputs(dtype=torch.float64):
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def test_wide_sums_are_stored_in_grad():
    model = linear()
    with GradientSums(model.parameters()) as sums:
        sums.backward(model(inputs()).sum())
        assert [id(tensor) for tensor in sums.tensors()] == [id(p.grad) for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_sums_are_float32_and_leave_no_grad(dtype):
    model = linear(dtype)
    with GradientSums(model.parameters()) as sums:
        for row in inputs(dtype):
            sums.backward(model(row).sum())
            assert all(p.grad is None for p in model.parameters())
        assert {tensor.dtype for tensor in sums.tensors()} == {torch.float32}
        assert ref.hooks_of(model) == 2
        sums.write_to_grad()
        assert {p.grad.dtype for p in model.parameters()} == {dtype}
    assert ref.hooks_of(model) == 0
    assert all(p.grad is None for p in model.parameters())


def test_user_hooks_are_kept():
    model = linear(torch.bfloat16)
    seen = []
    handle = model.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.dtype))
    with GradientSums(model.parameters()) as sums:
        sums.backward(model(inputs(torch.bfloat16)).sum())
    assert seen == [torch.bfloat16]
    assert ref.hooks_of(model) == 1
    handle.remove()


def test_sums_are_undivided_over_all_backwards():
    model = linear()
    full = ref.gradients_of(model, model(inputs()).square().sum())
    mean = ref.gradients_of(model, model(inputs()).square().sum() / 6)
    with GradientSums(model.parameters()) as sums:
        for rows in inputs().split([1, 3, 2]):
            sums.backward(model(rows).square().sum())
        named = sums.named_by({p: name for name, p in model.named_parameters()})
        assert ref.relative_error(named, full) <= 1e-12
        assert ref.relative_error(mean, full) > 1e-3


def test_parameters_without_gradient_have_zeros_and_are_unlisted():
    model = nn.ModuleDict({"used": linear(), "unused": linear()})
    with GradientSums(model.parameters()) as sums:
        sums.backward(model["used"](inputs()).sum())
        assert len(sums.tensors()) == 2
        named = sums.named_by({p: name for name, p in model.named_parameters()})
        assert not named["unused.weight"].any()


def test_other_leaves_get_no_gradient():
    model, other, rows = linear(), nn.Linear(2, 1).double(), inputs().requires_grad_()
    with GradientSums(model.parameters()) as sums:
        sums.backward(other(model(rows)).sum())
        assert model.weight.grad is not None
    assert other.weight.grad is None
    assert rows.grad is None


def test_detached_loss_raises_clear_error():
    model = linear()
    with (
        GradientSums(model.parameters()) as sums,
        pytest.raises(ValueError, match=r"does not depend on any parameter.*detached"),
    ):
        sums.backward(model(inputs()).sum().detach())


def test_retained_graph_can_be_differentiated_again():
    model = linear()
    loss = model(inputs()).square().sum()
    full = dict(
        zip(("weight", "bias"), torch.autograd.grad(loss, list(model.parameters()), retain_graph=True), strict=True)
    )
    with GradientSums(model.parameters()) as sums:
        sums.backward(loss)
        assert ref.relative_error(sums.named_by({p: name for name, p in model.named_parameters()}), full) <= 1e-12


def test_sparse_sums_are_coalesced_into_gradient():
    table = nn.Embedding(5, 2, sparse=True).double()
    with GradientSums(table.parameters()) as sums:
        for tokens in ([0, 1, 1], [1, 4]):
            sums.backward(table(torch.tensor(tokens)).sum())
        (values,) = sums.tensors()
        assert values.tolist() == [[1, 1], [3, 3], [1, 1]]
        values.mul_(0.5)
        assert table.weight.grad.to_dense().tolist() == [[0.5, 0.5], [1.5, 1.5], [0, 0], [0, 0], [0.5, 0.5]]


def test_loss_without_graph_names_a_legal_one():
    model = torch.nn.Linear(2, 1)
    with GradientSums(model.parameters()) as sums, pytest.raises(ValueError, match="parameter") as refused:
        sums.backward(torch.zeros(()))
    assert str(refused.value) == (
        "the loss does not depend on any parameter that requires a gradient: was it detached, or computed under "
        "torch.no_grad()? The loss of a micro-batch without anything to learn is model_output.sum() * 0."
    )
