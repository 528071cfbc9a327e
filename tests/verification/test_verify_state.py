"""`verify` starts every cut from the same state of the model, and restores it at the end."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigbatch
from support.stateful_models import KINDS, WIDTH, MomentumEncoder, Stateful, describe, loss_fn, rows


@pytest.mark.parametrize("kind", KINDS)
def test_uncut_batch_is_exact_for_any_state(kind: type[Stateful]) -> None:
    model = kind()
    before = describe(model)
    result = bigbatch.verify(model, loss_fn, rows(12), microbatch=[12, 12])
    assert [cut.relative_error for cut in result.cuts] == [0, 0]
    assert result.exact
    assert describe(model) == before


class ScaledByCalls(Stateful):
    """Counts its calls in a NumPy array and scales its output by them."""

    def __init__(self) -> None:
        super().__init__()
        import numpy as np

        self.calls = np.ones(1, dtype=np.float32)

    def moved(self, rows: Tensor) -> Any:
        self.calls += 1
        return rows * float(self.calls[0])


def test_cut_that_moves_state_is_not_exact() -> None:
    model = ScaledByCalls()
    result = bigbatch.verify(model, loss_fn, rows(12), microbatch=[4, 12])
    small, whole = result.cuts
    assert small.relative_error > 0.1
    assert whole.relative_error == 0
    assert model.calls.tolist() == [1]


def test_spectral_norm_is_exact_without_cut() -> None:
    torch.manual_seed(2)
    norm = nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(norm(nn.Linear(WIDTH, 32)), nn.GELU(), norm(nn.Linear(32, 2))).double()
    vectors = [buffer.clone() for buffer in model.buffers()]
    result = bigbatch.verify(model, loss_fn, rows(12).double(), microbatch=[3, 12])
    assert result.cuts[0].relative_error > 1e-6
    assert result.cuts[1].relative_error == 0
    assert all(torch.equal(buffer, vector) for buffer, vector in zip(model.buffers(), vectors, strict=True))


def test_state_of_criterion_is_the_same_in_every_cut() -> None:
    class Criterion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.center = torch.zeros(2, dtype=torch.float64)

        def forward(self, outputs: Tensor) -> Tensor:
            self.center = 0.5 * self.center + outputs.detach().mean(0)
            return (outputs - self.center).square().sum()

    criterion = Criterion()
    center = criterion.center
    model = nn.Linear(WIDTH, 2).double()
    result = bigbatch.verify(
        model, lambda model, part: (criterion(model(part)), len(part)), rows(9).double(), microbatch=[9, 9]
    )
    assert [cut.relative_error for cut in result.cuts] == [0, 0]
    assert criterion.center is center


def test_modes_set_by_caller_are_kept_between_cuts() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).double()
    model[1].eval()
    assert bigbatch.verify(model, loss_fn, rows(12).double(), microbatch=[5]).exact
    assert model[0].training
    assert not model[1].training


def test_error_in_any_call_of_verify_leaves_no_trace() -> None:
    model = MomentumEncoder()
    before = describe(model)
    calls = failing = num_raised = 0

    def fails(model: nn.Module, part: Tensor) -> tuple[Tensor, int]:
        nonlocal calls
        calls += 1
        result = loss_fn(model, part)
        if calls == failing:
            raise KeyboardInterrupt
        return result

    while failing <= calls:
        calls, failing = 0, failing + 1
        try:
            bigbatch.verify(model, fails, rows(4), microbatch=[2, 4])
        except KeyboardInterrupt:
            num_raised += 1
        assert describe(model) == before
    assert num_raised >= 7
