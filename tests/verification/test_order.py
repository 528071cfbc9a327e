"""Rounding by the order and the cut of the micro-batches, compared with that of the full batch."""

import pytest
import torch
from torch import nn

import bigbatch
from support import full_batch_reference as ref


def squares(model: nn.Module, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    return model(rows).square().sum(), len(rows)


def network(dtype: torch.dtype, *middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), *middle, nn.Linear(16, 1)).to(dtype)


def rows(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(24, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float64, 1e-18, 1e-14), (torch.float32, 1e-9, 1e-5)])
def test_orders_differ_by_rounding_as_full_batch_does(dtype: torch.dtype, least: float, most: float):
    found = bigbatch.verify(network(dtype, nn.Tanh()), squares, rows(dtype), orders=6)
    assert found.order is not None
    assert found.order.num_orders == 6
    assert least < found.order.relative_error < most
    assert least < found.order.full_batch_error < most
    assert str(found).splitlines()[-1] == (
        f"order: 6 random orders and cuts differ by at most {found.order.relative_error:.1e}, the full batch in these "
        f"orders by {found.order.full_batch_error:.1e}"
    )


def test_order_is_not_measured_by_default():
    assert bigbatch.verify(network(torch.float64), squares, rows(torch.float64)).order is None


def test_order_is_not_measured_for_inexact_cuts():
    found = bigbatch.verify(network(torch.float64, nn.BatchNorm1d(16)), squares, rows(torch.float64), orders=2)
    assert not found.exact
    assert found.order is None


def test_order_of_dropout_is_more_than_rounding():
    found = bigbatch.verify(network(torch.float64, nn.Dropout(0.5)), squares, rows(torch.float64), orders=2)
    assert found.exact, "masks are drawn row by row, so that a cut in order draws those of the full batch"
    assert found.order is not None
    assert found.order.relative_error > 0.1
    assert str(found).endswith(": more than rounding, as by random numbers (dropout) that are drawn in another order")


@pytest.mark.parametrize("samples", [2, 3, 4, 5])
def test_orders_of_few_samples_are_exact(samples: int):
    batch = ref.ragged_batch(samples)
    batch["labels"][:, 0] = batch["tokens"][:, 0] % 3
    found = bigbatch.verify(ref.make_model(), ref.loss_and_items, batch, microbatch=1, orders=5)
    assert found.order is not None
    assert found.order.relative_error < 1e-12


def test_negative_orders_are_refused():
    with pytest.raises(ValueError, match="orders") as refused:
        bigbatch.verify(network(torch.float64), squares, rows(torch.float64), orders=-1)
    assert str(refused.value) == "orders is -1: pass the number of random orders, 0 or more."
