"""Parameters that a loss reaches outside of the model: compared, named, and restored."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigbatch


def make():
    torch.manual_seed(0)
    return nn.Linear(4, 3).double(), nn.Linear(3, 5).double()


def batch_of(samples=12):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(5, (samples,), generator=generator)


def criterion_loss(head, model, batch, *, penalty=0.0):
    inputs, labels = batch
    loss_sum = F.cross_entropy(head(model(inputs)), labels, reduction="sum")
    return loss_sum + penalty * head.weight.square().sum(), len(labels)


class Trainer:
    def __init__(self, model, head):
        self.model, self.criterion = model, head

    def loss(self, model, batch):
        return criterion_loss(self.criterion, model, batch, penalty=2.0)


class LossModule(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.proxies = head

    def forward(self, model, batch):
        return criterion_loss(self.proxies, model, batch, penalty=2.0)


def closure(head):
    return lambda model, batch: criterion_loss(head, model, batch, penalty=2.0)


@pytest.mark.parametrize(
    ("make_loss", "name"),
    [
        (lambda model, head: closure(head), "head.weight"),
        (lambda model, head: Trainer(model, head).loss, "criterion.weight"),
        (lambda model, head: partial(criterion_loss, head, penalty=2.0), "argument 0.weight"),
        (lambda model, head: LossModule(head), "LossModule.proxies.weight"),
    ],
    ids=["closure", "method", "partial", "module"],
)
def test_wrong_gradient_of_criterion_is_named(make_loss, name):
    model, head = make()
    found = bigbatch.verify(model, make_loss(model, head), batch_of(), microbatch=[2])
    assert not found.exact
    assert found.worst[0].name == name
    assert found.worst[0].relative_error > 1e-2
    (cause,) = found.causes
    assert "a penalty that does not depend on the batch" in cause
    assert f"(it reaches {name})" in cause


def test_relative_error_covers_criterion():
    model, head = make()
    loss_fn = closure(head)
    batch = batch_of()
    found = bigbatch.verify(model, loss_fn, batch, microbatch=[3])
    own = [*model.parameters(), *head.parameters()]

    def gradient(size):
        parts = zip(batch[0].split(size), batch[1].split(size), strict=True)
        losses = [loss_fn(model, part)[0] for part in parts]
        return torch.cat([g.flatten() for g in torch.autograd.grad(sum(losses), own)])

    expected = (gradient(3) - gradient(12)).norm() / gradient(12).norm()
    assert found.relative_error == pytest.approx(float(expected), rel=1e-10)


def test_correct_criterion_is_exact():
    model, head = make()
    assert bigbatch.verify(model, partial(criterion_loss, head), batch_of(), microbatch=[1, 5]).exact


def test_unreferenced_parameter_is_named_by_shape():
    model, _ = make()
    scales = iter([nn.Parameter(torch.ones(3, dtype=torch.float64))] * 1000)  # nothing names what it yields

    def loss_fn(model, inputs):
        scale = next(scales)
        return (model(inputs) * scale).square().sum() + scale.square().sum(), len(inputs)

    found = bigbatch.verify(model, loss_fn, batch_of()[0], microbatch=[4])
    assert "criterion parameter [3]" in {parameter.name for parameter in found.worst}


def test_inputs_that_require_gradients_are_no_parameters():
    model, _ = make()

    def loss_fn(model, inputs):
        inputs = inputs.detach().requires_grad_()
        output = model(inputs)
        (slope,) = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        return slope.square().sum(), len(inputs)

    assert bigbatch.verify(model, loss_fn, batch_of()[0], microbatch=[4]).exact


def test_criterion_is_restored():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    head = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 5)).double()
    head[1].weight.grad = kept = torch.ones_like(head[1].weight)
    before = copy.deepcopy(head.state_dict())

    def loss_fn(model, batch):
        with torch.no_grad():
            head[1].weight.mul_(1.01)
        return F.cross_entropy(head(model(batch[0])), batch[1], reduction="sum"), len(batch[1])

    assert not bigbatch.verify(model, loss_fn, batch_of(), microbatch=[4]).exact
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert head[1].weight.grad is kept
    assert bool((kept == 1).all())
    assert head[1].bias.grad is None
