"""A small residual network with batch norm, and windows of it against the whole batch in one piece."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch

NUM_SAMPLES, WIDTH = 11, 6
TOLERANCE = 1e-12
Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Two convolutions with batch norm and a residual, as in a ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, three blocks with and without a downsampling shortcut, and a head with a 1-d norm."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Block(4, 4), Block(4, 6, 2), Block(6, 6))
        self.head = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
        for norm in norms(self):
            norm.momentum = momentum

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def resnet(momentum: float | None = 0.1, seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    return ResNet(momentum).double()


def images(num_samples: int = NUM_SAMPLES, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(num_samples, 3, 6, 6, generator=generator, dtype=torch.float64)
    return pixels, torch.randint(5, (num_samples,), generator=generator)


def classify(model: Any, batch: Batch) -> tuple[Tensor, int]:
    pixels, labels = batch
    return F.cross_entropy(model(pixels), labels, reduction="sum"), len(labels)


class Small(nn.Module):
    """A module whose forward is a function of itself and its input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.BatchNorm1d(WIDTH)
        for name, module in modules.items():
            setattr(self, name, module)
        self._forward = forward
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def plain(model: Any, x: Tensor) -> Tensor:
    return model.last(model.norm(model.first(x)).tanh())


def rows(num_samples: int = NUM_SAMPLES, seed: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, num_samples, WIDTH, generator=generator, dtype=torch.float64)
    return values[0], values[1]


def squares(model: Any, batch: Batch) -> tuple[Tensor, int]:
    inputs, targets = batch
    return F.mse_loss(model(inputs), targets, reduction="sum"), len(targets)


def engine_of(model: nn.Module, loss_fn: Any, cut: int, **settings: Any) -> bigbatch.Engine:
    return bigbatch.Engine(model, None, loss_fn, microbatch=cut, **{"batch_norm": "exact", "check": False, **settings})


def whole(model: nn.Module, loss_fn: Any, batches: Sequence[Any]) -> nn.Module:
    """Return a copy of a model after a forward and backward of each batch in one piece, with the last gradient."""
    copied = copy.deepcopy(model)
    for batch in batches:
        copied.zero_grad()
        loss_sum, items = loss_fn(copied, batch)
        (loss_sum / items).backward()
    return copied


def gradient_error(model: nn.Module, expected: nn.Module) -> float:
    """Return the relative difference of all gradients."""
    found, wanted = ([p.grad for p in each.parameters()] for each in (model, expected))
    assert [gradient is None for gradient in found] == [gradient is None for gradient in wanted]
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if a is not None and b is not None]
    difference = torch.cat([(a - b).flatten() for a, b in pairs]).norm()
    return float(difference / torch.cat([b.flatten() for _, b in pairs]).norm())


def buffer_error(model: nn.Module, expected: nn.Module) -> float:
    """Return the largest difference of any buffer."""
    pairs = zip(model.buffers(), expected.buffers(), strict=True)
    return max((float((a.double() - b.double()).abs().max()) for a, b in pairs), default=0.0)
