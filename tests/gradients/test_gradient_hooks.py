"""Hooks for one backward: what they see, and that nothing of them remains."""

import torch
from torch import Tensor, nn

import bigbatch
from bigbatch.gradients.gradient_hooks import GradientHooks


def test_hooks_see_whole_gradients_until_removed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)  # type: ignore[union-attr]
    seen: list[Tensor] = []
    hooks = GradientHooks(model.parameters(), seen.append)
    model(torch.ones(5, 3)).sum().backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(expected) == 3
    for gradient in expected:
        assert any(torch.equal(gradient, other) for other in seen if other.shape == gradient.shape)
    hooks.remove()
    hooks.remove()
    model(torch.ones(5, 3)).sum().backward()
    assert len(seen) == 3


def test_removed_hooks_leave_no_trace() -> None:
    model = nn.Linear(3, 2)
    theirs: list[Tensor] = []
    handle = model.weight.register_hook(theirs.append)  # type: ignore[no-untyped-call]
    GradientHooks(model.parameters(), lambda gradient: None).remove()
    assert model.bias._backward_hooks is None
    assert model.weight._backward_hooks is not None
    model(torch.ones(1, 3)).sum().backward()
    assert len(theirs) == 1
    handle.remove()


def test_measured_windows_leave_no_hook_on_parameters() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = bigbatch.Engine(model, optimizer, lambda m, x: (m(x).sum(), len(x)), microbatch=2)
    for _ in range(10):
        engine.step(torch.randn(9, 3))
        assert [p._backward_hooks for p in model.parameters()] == [None, None]
    assert engine.accumulator.noise is not None
    assert engine.accumulator.noise.state_dict()["num_windows"] == 9
