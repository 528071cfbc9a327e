"""Models that keep state of many kinds outside of parameters, and a description of all of it."""

import random
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WIDTH = 4


def loss_fn(model: nn.Module, rows: Tensor) -> tuple[Tensor, int]:
    return model(rows).square().sum(), len(rows)


def rows(count: int = 8) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1)) + 1


class Stateful(nn.Module):
    """A linear layer whose output is moved by the state: a wrong state gives a wrong loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        return self.linear(rows) + self.moved(rows.detach())

    def moved(self, rows: Tensor) -> Any:
        raise NotImplementedError


class HalfPrecisionAverage(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.average = torch.ones(WIDTH, dtype=torch.bfloat16)

    def moved(self, rows: Tensor) -> Any:
        self.average = self.average.lerp(rows.mean(0).bfloat16(), 0.5)
        return self.average.float()


class AverageInPlace(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.average = torch.ones(WIDTH, dtype=torch.float64)
        self.first = self.average[:1]  # a view

    def moved(self, rows: Tensor) -> Any:
        self.average.mul_(0.5).add_(rows.mean(0))
        return self.first.float()


class History(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.history: deque[float] = deque([0.5, 0.25], maxlen=3)

    def moved(self, rows: Tensor) -> Any:
        self.history.append(float(len(rows)))
        return sum(self.history)


class Nested(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.moments: dict[str, Any] = {"first": {"mean": torch.zeros(WIDTH)}, "counts": [0, (torch.zeros(1),)]}

    def moved(self, rows: Tensor) -> Any:
        first = self.moments["first"]
        first["mean"] = first["mean"] + rows.mean(0)
        self.moments["counts"][0] += 1
        self.moments["counts"][1][0].add_(1)
        self.moments.setdefault("last", len(rows))
        return first["mean"] + self.moments["counts"][1][0]


class NumpyCounter(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.seen = np.zeros(3, dtype=np.int64)

    def moved(self, rows: Tensor) -> Any:
        self.seen[1] += len(rows)
        return float(self.seen.sum())


@dataclass
class Progress:
    calls: int = 0
    recent: list[int] = field(default_factory=list)


@dataclass(slots=True)
class SlottedProgress:
    calls: int = 0
    mean: Any = None


class StateObjects(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.progress, self.slotted = Progress(), SlottedProgress()

    def moved(self, rows: Tensor) -> Any:
        self.progress.calls += 1
        self.progress.recent.append(len(rows))
        self.slotted.calls += 1
        self.slotted.mean = rows.mean(0)
        return self.progress.calls + self.slotted.mean


class CreatedByForward(Stateful):
    def moved(self, rows: Tensor) -> Any:
        if not hasattr(self, "scale"):
            self.scale = rows.mean()  # of the first rows that it ever sees
        return self.scale


class DeletedByForward(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.warm = 3.0

    def moved(self, _rows: Tensor) -> Any:
        return self.__dict__.pop("warm", 0.0)


class Appending(nn.Module):
    def __init__(self, shared: list[int]) -> None:
        super().__init__()
        self.shared = shared


class SharedList(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.shared = [1]
        self.child = Appending(self.shared)

    def moved(self, _rows: Tensor) -> Any:
        self.child.shared.append(len(self.shared))
        return sum(self.shared)


class ReboundBuffer(Stateful):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int32))

    def moved(self, _rows: Tensor) -> Any:
        self.count = self.count + 1
        return self.count


class OwnGenerators(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)
        self.of_numpy = np.random.default_rng(3)
        self.of_python = random.Random(3)

    def moved(self, _rows: Tensor) -> Any:
        noise = torch.randn(WIDTH, generator=self.generator)
        return noise + float(self.of_numpy.random()) + self.of_python.random()


class ClassCounter(Stateful):
    calls = 0
    sizes: list[int] = []  # noqa: RUF012 - shared by all instances on purpose

    def moved(self, rows: Tensor) -> Any:
        type(self).calls += 1
        self.sizes.append(len(rows))
        return self.calls + len(self.sizes)


class HiddenTeacher(Stateful):
    """A teacher in a list, so that it is not among the parameters; its batch norm keeps buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH, momentum=None))]

    def moved(self, rows: Tensor) -> Any:
        self.teacher[0](torch.cat([rows, 2 * rows]))  # batch norm needs two rows
        return self.teacher[0][1].running_mean


class MomentumEncoder(Stateful):
    """Writes to parameters in its forward, in place and by rebinding them."""

    def __init__(self) -> None:
        super().__init__()
        self.in_place, self.rebound = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.in_place.requires_grad_(requires_grad=False)
        self.rebound.requires_grad_(requires_grad=False)

    def moved(self, rows: Tensor) -> Any:
        self.in_place.weight.data.mul_(0.5).add_(self.linear.weight.data)
        self.rebound.weight.data = 0.5 * self.rebound.weight.data + self.linear.weight.data
        with torch.no_grad():
            return self.in_place(rows) + self.rebound(rows)


class HiddenMomentumEncoder(Stateful):
    """A momentum encoder in a tuple, so that it is not among the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = (nn.Linear(WIDTH, WIDTH, dtype=torch.float64).requires_grad_(requires_grad=False),)

    def moved(self, rows: Tensor) -> Any:
        torch._foreach_lerp_(
            list(self.encoder[0].parameters()), [p.detach().double() for p in self.linear.parameters()], 0.5
        )
        return self.encoder[0](rows.double()).detach().float()


class HiddenState(Stateful):
    """Keeps a tensor with its graph, which requires a gradient and is no leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = self.linear(torch.ones(WIDTH))

    def moved(self, rows: Tensor) -> Any:
        before, self.hidden = self.hidden.detach(), self.linear(rows.mean(0))
        return before


class LeastRecentlyUsed(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.cache: OrderedDict[str, float] = OrderedDict(a=1.0, b=2.0, c=3.0)
        self.used: set[str] = {"a"}

    def moved(self, _rows: Tensor) -> Any:
        key = next(iter(self.cache))
        self.cache.move_to_end(key)
        self.used.add(key)
        return self.cache[key] * len(self.used)


KINDS: list[Callable[[], Stateful]] = [
    HalfPrecisionAverage,
    AverageInPlace,
    History,
    Nested,
    NumpyCounter,
    StateObjects,
    CreatedByForward,
    DeletedByForward,
    SharedList,
    ReboundBuffer,
    OwnGenerators,
    ClassCounter,
    HiddenTeacher,
    MomentumEncoder,
    HiddenMomentumEncoder,
    HiddenState,
    LeastRecentlyUsed,
]


def describe(model: Stateful) -> list[Any]:
    """Return all state of a model as comparable values, with the identity of every object."""
    seen: set[int] = set()
    return [line for part in (model, ClassCounter.calls, ClassCounter.sizes) for line in _describe(part, seen)]


def content(model: Stateful) -> list[Any]:
    """Return all state of a model as comparable values, without identities: equal for equal models."""
    return [line for line in describe(model) if line[0] != "id"]


def _describe(value: Any, seen: set[int]) -> list[Any]:
    found: list[Any] = [("id", id(value))] if isinstance(value, Tensor | list | dict | set | nn.Module) else []
    if id(value) in seen:
        return found
    if not isinstance(value, int | float | str | type(None)):
        seen.add(id(value))
    if isinstance(value, Tensor):
        assert type(value) in (Tensor, nn.Parameter)
        numbers = value.detach().double().tolist()
        return [*found, ("tensor", value.dtype, value.requires_grad, value.is_leaf, numbers)]
    if isinstance(value, torch.Generator):
        return [("generator", value.get_state().tolist())]
    if isinstance(value, np.random.Generator):
        return [("generator", str(value.bit_generator.state))]
    if isinstance(value, random.Random):
        return [("generator", value.getstate())]
    if isinstance(value, np.ndarray):
        return [("array", value.tolist())]
    if isinstance(value, Progress | nn.Module):
        return [*found, *_items({name: part for name, part in vars(value).items() if "hook" not in name}, seen)]
    if isinstance(value, dict):
        return [*found, *_items(value, seen)]
    if isinstance(value, set):
        return [*found, ("set", sorted(value))]
    if isinstance(value, list | tuple | deque):
        return [*found, ("length", len(value)), *(line for item in value for line in _describe(item, seen))]
    if isinstance(value, SlottedProgress):
        return [("slots", value.calls), *_describe(value.mean, seen)]
    return [("value", value)]


def _items(mapping: dict[Any, Any], seen: set[int]) -> list[Any]:
    return [line for key, part in mapping.items() for line in [("key", key), *_describe(part, seen)]]
