"""Random networks of linear layers, batch norms, branches and checkpoints, in random cuts, against the whole batch."""

import copy
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batch_norm.models import WIDTH, buffer_error, engine_of, gradient_error, rows, squares, whole
from support.tiers import slow_except

KINDS = ("linear", "norm", "norm", "softplus", "add", "gate", "checkpoint", "teacher", "detached")


class Step:
    """One operation on two earlier results, with a linear layer and a norm."""

    def __init__(self, generator: random.Random, num_values: int, num_norms: int) -> None:
        self.kind = generator.choice(KINDS)
        self.left, self.right = generator.randrange(num_values), generator.randrange(num_values)
        self.linear, self.norm = generator.randrange(3), generator.randrange(num_norms)


class Network(nn.Module):
    """Steps that each read results of earlier ones; a norm inside a checkpoint is called there only."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = random.Random(seed)
        torch.manual_seed(seed)
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norms = nn.ModuleList(self._norm(generator) for _ in range(generator.randint(1, 5)))
        self.steps = [Step(generator, i + 1, len(self.norms)) for i in range(generator.randint(3, 14))]
        self.checkpoints = True
        self._avoid_repeated_checkpoints()
        self.double()

    def _norm(self, generator: random.Random) -> nn.Module:
        momentum = generator.choice([0.1, 0.5, 1.0, None])
        affine, tracks = generator.random() < 0.8, generator.random() < 0.8
        norm = nn.BatchNorm1d(WIDTH, momentum=momentum, affine=affine, track_running_stats=tracks)
        return norm.train(generator.random() < 0.85)

    def _avoid_repeated_checkpoints(self) -> None:
        used: set[int] = set()
        inside = {step.norm for step in self.steps if step.kind == "checkpoint"}
        for step in self.steps:
            if step.kind == "checkpoint":
                step.kind = "linear" if step.norm in used else "checkpoint"
                used.add(step.norm)
            elif step.kind in ("norm", "teacher", "detached") and step.norm in inside:
                step.kind = "linear"

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(self._run(step, values[step.left], values[step.right]))
        return torch.stack(values[1:]).sum(0) + self.linears[0](x)

    def _run(self, step: Step, left: Tensor, right: Tensor) -> Tensor:
        linear, norm = self.linears[step.linear], self.norms[step.norm]
        if step.kind == "checkpoint":
            body = partial(lambda inner, outer, h: outer(inner(h)).tanh(), linear, norm)
            return checkpoint(body, left, use_reentrant=False) if self.checkpoints else body(left)
        if step.kind == "teacher":
            with torch.no_grad():
                return norm(linear(left)) + right
        results = {
            "linear": lambda: linear(left),
            "norm": lambda: norm(left),
            "softplus": lambda: F.softplus(left),
            "add": lambda: left + right,
            "gate": lambda: left * right.sigmoid(),
            "detached": lambda: norm(left.detach()) + right,
        }
        return results[step.kind]()


@pytest.mark.parametrize("start", slow_except(range(0, 60, 10), 0))
def test_random_networks_are_exact(start: int) -> None:
    for seed in range(start, start + 10):
        model, generator = Network(seed), random.Random(seed)
        num_samples = generator.randint(3, 13)
        batches = [rows(num_samples, seed), rows(num_samples + 1, seed + 1)]
        plain = copy.deepcopy(model)
        plain.checkpoints = False  # torch moves the statistics again when a checkpoint repeats a forward
        expected = whole(plain, squares, batches)
        engine = engine_of(model, squares, generator.randint(1, num_samples))
        for batch in batches:
            engine.backward(batch)
        assert gradient_error(model, expected) <= 1e-12, seed
        assert buffer_error(model, expected) <= 1e-12, seed
