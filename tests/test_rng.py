"""Random states are captured and set together, and checked before the first generator changes."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch

from bigbatch.rng import check_random_states, random_states, seed_everything, set_random_states


def draw() -> tuple[float, float, float, float]:
    return torch.rand(()).item(), random.random(), random.gauss(0, 1), float(np.random.standard_normal())


def test_generators_repeat_from_their_states() -> None:
    seed_everything(7)
    draw()
    states = random_states()
    first = draw()
    check_random_states(states)
    set_random_states(states)
    assert draw() == first


CPU = torch.get_rng_state()
EDITS: list[tuple[tuple[Any, ...], Any, str]] = [
    (("cpu",), CPU[:-8], "cpu"),
    (("cpu",), CPU.to(torch.int64), "cpu"),
    (("cpu",), CPU.reshape(2, -1), "cpu"),
    (("cpu",), torch.zeros_like(CPU), "cpu"),
    (("cpu",), CPU.to("meta"), "cpu"),
    (("devices",), [torch.zeros(16)], r"devices\.0"),
    (("python",), (3, (1, 2, 3), None), "python"),
    (("python",), (3, (2**32,) * 625, None), "python"),
    (("python",), (3, (1,) * 624 + (625,), None), "python"),
    (("python",), (1, (1,) * 625, None), "python"),
    (("python",), "text", "python"),
    (("numpy", "state", "key"), [1] * 623, "numpy"),
    (("numpy", "state", "key"), [-1] * 624, "numpy"),
    (("numpy", "state", "pos"), 700, "numpy"),
    (("numpy", "has_gauss"), 2, "numpy"),
    (("numpy", "gauss"), "0", "numpy"),
    (("numpy", "bit_generator"), "PCG64", "numpy"),
]


@pytest.mark.parametrize(("path", "value", "name"), EDITS, ids=range(len(EDITS)))
def test_invalid_random_state_is_rejected(path: tuple[Any, ...], value: Any, name: str) -> None:
    states = copy.deepcopy(random_states())
    place: Any = states
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(
        ValueError, match=rf"^the random state {name} is not one of its generator \(.*\): use the states"
    ):
        check_random_states(states)


def test_missing_random_state_is_rejected() -> None:
    states = random_states()
    del states["python"]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole sentence follows)
        check_random_states(states)
    assert str(caught.value) == (
        "the random states are of cpu, devices, numpy, not of cpu, devices, numpy, python: use all of them."
    )


def test_check_draws_nothing() -> None:
    states = random_states()
    check_random_states(states)
    again = random_states()
    assert torch.equal(states["cpu"], again["cpu"])
    assert (states["python"], states["numpy"]) == (again["python"], again["numpy"])
