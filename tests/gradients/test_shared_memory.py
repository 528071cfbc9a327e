"""Gradients that autograd stores as views of the same memory: each parameter has a sum of its own nevertheless."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigbatch
from bigbatch.gradients.fixed_point_sums import CPU_CHUNK, SMALL, FixedPointSums
from bigbatch.gradients.gradient_sums import GradientSums
from bigbatch.gradients.graph_leaves import shares_memory

SIZES = pytest.mark.parametrize("size", [6, 2 * SMALL, 2 * CPU_CHUNK], ids=["small", "large", "in chunks"])


class Added(nn.Module):
    """Its second and third parameter receive views of the gradient that flows to the layer before them."""

    def __init__(self, size: int, form: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(size, generator=generator))
        self.second = nn.Parameter(torch.randn(size, generator=generator))
        self.third = nn.Parameter(torch.randn(size, generator=generator))
        self.form = form

    def forward(self, inputs: Tensor) -> Tensor:
        if self.form == "rows":
            return inputs * self.first + (self.second[None] + self.third[None])
        shape = 2, len(self.second) // 2
        shifts = self.second.view(shape) + self.third.view(shape)
        return (inputs * self.first).view(-1, *shape) + shifts


def loss_fn(model: nn.Module, inputs: Tensor) -> tuple[Tensor, int]:
    return model(inputs).square().sum(), len(inputs)


@SIZES
@pytest.mark.parametrize("form", ["rows", "views"])
@pytest.mark.parametrize("microbatch", [1, 2, 4])
@pytest.mark.parametrize("settings", [{}, {"reproducible": True}, {"offload": "optimizer"}], ids=str)
def test_update_is_that_of_separate_gradients(size: int, form: str, microbatch: int, settings: dict[str, Any]):
    inputs = torch.randn(4, size, generator=torch.Generator().manual_seed(1))
    model, expected = Added(size, form), Added(size, form).double()
    losses, items = loss_fn(expected, inputs.double())
    gradients = torch.autograd.grad(losses / items, list(expected.parameters()))
    settings = {**settings, "quantum": microbatch} if "reproducible" in settings else settings
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=microbatch, **settings)
    engine.step(inputs)
    for parameter, before, gradient in zip(model.parameters(), expected.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.detach().double(), before.detach() - gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_tensors_of_others_are_not_changed(scaled: bool):
    constant = torch.full((2 * SMALL,), 3.0)

    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            ctx.save_for_backward(constant)
            return (weight * constant).sum()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return ctx.saved_tensors[0].view(-1)

    weight = nn.Parameter(torch.ones(2 * SMALL))
    sums = FixedPointSums([weight], scales=[20]) if scaled else GradientSums([weight])
    with sums:
        for _ in range(2):
            sums.backward(Times.apply(weight))
        (total,) = sums.tensors()
        assert torch.equal(total, torch.full_like(total, 6 * 2**20 if scaled else 6))
    assert torch.equal(constant, torch.full_like(constant, 3.0))


def test_gradient_that_cannot_be_copied_is_computed_again(monkeypatch: pytest.MonkeyPatch):
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def loss() -> Tensor:
        return ((first[None] + second[None]) * 2).sum()

    with GradientSums([first, second]) as sums:
        versions = sums.snapshot_versions()
        with monkeypatch.context() as patch:

            def fail(_: Tensor) -> Tensor:
                raise torch.OutOfMemoryError("CUDA out of memory.")

            patch.setattr(Tensor, "clone", fail)
            with pytest.raises(torch.OutOfMemoryError):
                sums.backward(loss())
        only = sums.unchanged_since(versions)
        assert len(only) == 1
        sums.backward(loss(), only=only)
        sums.backward(loss())
        assert [total.tolist() for total in sums.tensors()] == [[4.0] * 3] * 2


LAYERS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Linear(4, 4), (2, 4)),
    (lambda: nn.LayerNorm(4), (2, 4)),
    (lambda: nn.Conv2d(3, 4, 3), (1, 3, 8, 8)),
    (lambda: nn.GRU(4, 4), (3, 2, 4)),
    (lambda: nn.TransformerEncoderLayer(8, 2, 16), (3, 2, 8)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_gradients_of_usual_layers_are_not_copied(
    make: Callable[[], nn.Module], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    model = make()
    with GradientSums(model.parameters()) as sums:
        monkeypatch.setattr(Tensor, "clone", None)
        output = model(torch.randn(shape))
        sums.backward((output[0] if isinstance(output, tuple) else output).sum())
        assert not any(map(shares_memory, sums.tensors()))


def test_sparse_tensors_and_subclasses_are_left_alone():
    class Other(Tensor):
        pass

    assert not shares_memory(torch.eye(2).to_sparse())
    assert not shares_memory(torch.ones(2).as_subclass(Other))
    tensor = torch.ones(2)
    assert not shares_memory(tensor)
    view = tensor[:1]
    assert shares_memory(tensor)
    assert shares_memory(view)
