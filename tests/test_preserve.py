"""What is put back: everything."""

import random

import pytest
import torch
from torch import nn

from bigbatch.preserve import preserved
from bigbatch.rng import seed_everything

numpy = pytest.importorskip("numpy")


def model_with_everything():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
    model[2].eval()
    model[0].weight.grad = torch.ones(3, 3)
    return model


def disturb(model):
    model.zero_grad()
    model(torch.randn(5, 3)).sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
        model[3].weight.data = torch.full((1, 3), float("nan"))
    model.zero_grad()
    model[3].bias.grad = torch.ones(1)
    model.eval()
    model[1].running_mean.fill_(9.0)
    seed_everything(5)
    random.random()
    numpy.random.rand()


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_gradients_buffers_modes_and_rng_are_restored(fails):
    model = model_with_everything()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = [*model.parameters(), *model.buffers()]
    gradients = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    random_states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    try:
        with preserved(model):
            disturb(model)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(now is then for now, then in zip([*model.parameters(), *model.buffers()], tensors, strict=True))
    for p, gradient, values in gradients:
        assert p.grad is gradient
        assert values is None or torch.equal(gradient, values)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    assert all(numpy.array_equal(a, b) for a, b in zip(numpy.random.get_state(), random_states[2], strict=True))


def test_gradients_accumulated_by_backward_are_restored():
    model = nn.Linear(2, 1)
    model.weight.grad = before = torch.ones(1, 2)
    with preserved(model):
        model(torch.ones(3, 2)).sum().backward()
    assert model.weight.grad is before
    assert before.tolist() == [[1, 1]]


def test_reassigned_buffer_is_restored():
    """``self.count = self.count + 1`` binds another tensor to the buffer's name."""

    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

    model = Counter()
    before = model.count
    with preserved(model):
        model.count = model.count + 1
    assert model.count is before
    assert model.count == 0


def test_modules_in_lists_and_other_roots_are_restored():
    model, criterion = nn.Linear(2, 1), nn.BatchNorm1d(2)
    model.hidden = [nn.Linear(1, 1).eval()]
    model.hidden[0].weight.grad = before = torch.ones(1, 1)
    mean = criterion.running_mean
    with preserved(model, criterion, parameters=False) as state:
        assert model.hidden[0].weight.grad is None
        model.hidden[0].train()
        model.hidden[0](model(criterion(torch.randn(4, 2)))).sum().backward()
        criterion.running_mean = None
        state.restore()
        assert criterion.running_mean is mean
        assert mean.tolist() == [0, 0]
        assert model.hidden[0].training, "modes are restored at the end"
        criterion(torch.randn(4, 2))
    assert mean.tolist() == [0, 0]
    assert model.hidden[0].weight.grad is before
    assert before.item() == 1
    assert not model.hidden[0].training


def test_seeds_reach_every_generator():
    draws = []
    for _ in range(2):
        seed_everything(3)
        draws.append((torch.rand(1).item(), random.random(), float(numpy.random.rand())))
    assert draws[0] == draws[1]
