"""The plain values of an engine's state: sizes of micro-batches, the choice, and the noise averages."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigbatch
from bigbatch.autotune.choice import MicrobatchChoice
from bigbatch.autotune.time_model import TimeModel
from bigbatch.engine.microbatch_size import MicrobatchSize
from bigbatch.scaling.noise_scale import NoiseScaleEstimator


def loss_fn(model: nn.Module, rows: Tensor) -> tuple[Tensor, int]:
    return model(rows).square().sum(), len(rows)


def engine_of(**settings: Any) -> bigbatch.Engine:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return bigbatch.Engine(model, torch.optim.Adagrad(model.parameters()), loss_fn, **settings)


def choice_of(size: int = 4, unit: str = "samples") -> MicrobatchChoice:
    timing = TimeModel(((2, 0.1), (8, 0.2)))
    return MicrobatchChoice(size, 1, unit, 1000, 2000, 10.0, 8, (), timing)


def refusal(engine: bigbatch.Engine, state: Any) -> str:
    before = engine.microbatch_size.state_dict(), engine.accumulator.noise.state_dict()
    weight = engine.model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"\.$|tune again") as caught:
        engine.load_state_dict(state)
    assert before == (engine.microbatch_size.state_dict(), engine.accumulator.noise.state_dict())
    assert torch.equal(engine.model.weight, weight)
    return str(caught.value)


def test_choice_and_reduced_size_are_restored() -> None:
    one, other = engine_of(), engine_of()
    one.set_microbatch(choice_of())
    one.microbatch_size.observe(retries=1)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert other.choice == choice_of()
    assert (other.microbatch_size.limit, other.microbatch_size.current) == (4, 3)


def test_choice_in_another_unit_changes_nothing() -> None:
    one, other = engine_of(lengths=lambda batch: [3] * len(batch)), engine_of()
    one.set_microbatch(choice_of(64, "tokens"))
    with torch.no_grad():
        one.model.weight.add_(1.0)
    assert refusal(other, copy.deepcopy(one.state_dict())) == (
        "the choice is in tokens, and this engine counts samples: pass lengths=, or tune again."
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("size",), True),
        (("size",), 5),
        (("size_in_use",), 0),
        (("size_in_use",), 9),
        (("good_windows",), -1),
        (("choice", "trials"), [{"size": 1}]),
        (("choice", "unit"), None),
        (("choice", "timing", "points"), []),
        (("choice", "timing", "points"), [(8, 0.1), (2, 0.2)]),
        (("choice", "timing", "points"), [(2, math.nan)]),
        (("choice", "limited"), 1),
        (("choice", "size"), "4"),
    ],
    ids=str,
)
def test_invalid_size_or_choice_is_refused(path: tuple[str, ...], value: Any) -> None:
    one, other = engine_of(), engine_of()
    one.set_microbatch(choice_of())
    state = copy.deepcopy(one.state_dict())
    place: Any = state["engine"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert "engine." in refusal(other, state) or path[-1] == "unit"


def test_sizes_alone_check_their_state() -> None:
    size = MicrobatchSize(4, has_lengths=False, layout="padded")
    state = {**size.state_dict(), "size_in_use": 5}
    with pytest.raises(ValueError, match=r"engine\.size_in_use is 5, above the engine\.size of 4"):
        size.load_state_dict(state)
    assert size.current == 4


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"extra": 1.0}, "the noise averages lack or have in addition extra: use those of state_dict()."),
        ({"weight": "1"}, "the noise average weight cannot be '1': use those of state_dict()."),
        ({"items": -2.0}, "the noise average items cannot be -2.0: use those of state_dict()."),
        ({"num_windows": 1.5}, "the noise average num_windows cannot be 1.5: use those of state_dict()."),
        ({"noise": True}, "the noise average noise cannot be True: use those of state_dict()."),
        ({"num_windows": 3}, "the noise averages are of 3 windows without weight: use those of state_dict()."),
    ],
    ids=str,
)
def test_invalid_noise_averages_are_refused(edit: dict[str, Any], message: str) -> None:
    engine = engine_of(microbatch=2)
    state = copy.deepcopy(engine.state_dict())
    state["engine"]["noise"].update(edit)
    assert refusal(engine, state) == message


def test_noise_averages_of_old_states_load() -> None:
    averages = {**NoiseScaleEstimator().state_dict(), "weight": 4.0, "half_life_items": 2.0, "num_windows": 5}
    for name in ("num_seen", "items_unmeasured"):
        del averages[name]
    estimator = NoiseScaleEstimator()
    estimator.load_state_dict(averages)
    assert estimator.state_dict() == {**averages, "num_seen": 0, "items_unmeasured": 0.0}
