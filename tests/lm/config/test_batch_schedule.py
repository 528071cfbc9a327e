"""A global batch that changes: what a flag says, which samples each window takes, and the rate that goes with it."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bigbatch.errors import InputError
from bigbatch.lm.config.batch_schedule import PiecewiseConstant, Ramp, Seesaw, read
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.sampling_order import epoch_order
from bigbatch.lm.training.optimizer import rescale_second_moment
from bigbatch.lm.training.schedule import TrainingSchedule
from support.tiers import slow

LENGTHS = [3 + (7 * i) % 11 for i in range(200)]  # tokens


def course(*, step: int = 0, cursor: int = 0, lengths: Sequence[int] = LENGTHS, **settings: object) -> TrainingSchedule:
    return TrainingSchedule(TrainConfig(**settings).resolved(), lengths, step=step, cursor=cursor)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0:64 2e6:128 8e6:256", PiecewiseConstant(((0, 64), (2_000_000, 128), (8_000_000, 256)))),
        ("0:64,2_000_000:128", PiecewiseConstant(((0, 64), (2_000_000, 128)))),
        ("ramp 64 256 8e6", Ramp(64, 256, 8_000_000)),
        ("seesaw 0.5", Seesaw(0.5)),
        ("seesaw 0.25 16", Seesaw(0.25, 16.0)),
    ],
)
def test_flag_is_parsed(text: str, wanted: object) -> None:
    assert read(text) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it must be"),
        ("64", "'64' has no colon"),
        ("5:64", "it must start at 0 tokens, but starts at 5"),
        ("0:64 100:32 100:8", "its tokens must increase, but 100 follows 100"),
        ("0:0", "'0' must be a whole number of 1 or more"),
        ("0:1.5", "'1.5' must be a whole number of 1 or more"),
        ("0:many", "'many' is not a number"),
        ("0:1e400", "'1e400' is out of range"),
        ("ramp 1 2", "a ramp needs three numbers"),
        ("seesaw 2", "seesaw needs the decay factor of the rate, between 0 and 1"),
        ("seesaw", "seesaw needs the decay factor of the rate"),
    ],
)
def test_invalid_schedule_is_rejected_with_reason(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^.*{said}"):
        read(text)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 10**6), st.integers(0, 2 * 10**6))
def test_ramp_stays_between_ends_and_reaches_second(start: int, end: int, tokens: int, now: int) -> None:
    batch = Ramp(start, end, tokens).batch_at(now)
    assert min(start, end) <= batch <= max(start, end)
    assert now < tokens or batch == end


def test_schedule_keeps_sample_order_of_every_epoch() -> None:
    one = course(global_batch_schedule="0:3 200:10 900:40", epochs=2)
    windows = list(one.windows(0, 0))
    assert [i for window in windows for i in window] == [
        i for epoch in range(2) for i in epoch_order(200, seed=0, epoch=epoch)
    ]
    assert len(windows) == one.total_steps


def test_batch_changes_at_first_window_after_tokens() -> None:
    tokens = 0
    for window in course(global_batch_schedule="0:3 200:10 900:40", steps=20).windows(0, 0):
        wanted = 3 if tokens < 200 else 10 if tokens < 900 else 40
        assert len(window) == wanted or tokens + sum(LENGTHS[i] for i in window) == sum(LENGTHS)
        tokens += sum(LENGTHS[i] for i in window)
        if tokens >= sum(LENGTHS):
            return


def test_tokens_are_counted_over_epochs() -> None:
    of_a_pass = sum(LENGTHS)
    one = course(global_batch_schedule=f"0:10 {of_a_pass + 400}:40", epochs=2)
    sizes = [len(window) for window in one.windows(0, 0)]
    assert sizes[:20] == [10] * 20
    second = sizes[20:]
    assert second[:3] == [10] * 3
    assert second.index(40) * 10 * of_a_pass / len(LENGTHS) == pytest.approx(400, abs=100)


@pytest.mark.parametrize("text", [slow("0:3 200:10 900:40"), "ramp 2 60 2000", slow("seesaw 0.5 8")])
def test_resumed_run_makes_the_same_windows(text: str) -> None:
    settings = {"global_batch_schedule": text, "steps": 40}
    whole = course(**settings)
    windows = list(whole.windows(0, 0))
    cursor = 0
    for step, window in enumerate(windows):
        later = course(step=step, cursor=cursor, **settings)
        assert later.total_steps == whole.total_steps
        assert list(later.windows(step, cursor)) == windows[step:]
        assert later.lr_factor(step) == whole.lr_factor(step)
        cursor += len(window)


@pytest.mark.parametrize("text", ["0:3 200:10 900:40", "ramp 2 60 2000"])
def test_epochs_are_counted_with_scheduled_batches(text: str) -> None:
    one = course(global_batch_schedule=text, epochs=3)
    assert sum(map(len, one.windows(0, 0))) == 3 * len(LENGTHS)
    steps = list(one.windows(0, 0))
    halfway = sum(map(len, steps[:7]))
    assert course(global_batch_schedule=text, epochs=3, step=7, cursor=halfway).total_steps == one.total_steps


def test_seesaw_uses_same_samples_in_fewer_updates() -> None:
    plain = course(global_batch=4, steps=100, warmup_steps=10)
    seesaw = course(global_batch=4, steps=100, warmup_steps=10, global_batch_schedule="seesaw 0.5")
    windows = list(seesaw.windows(0, 0))
    assert 0 <= sum(map(len, windows)) - 400 < 64
    assert len(windows) < 75
    samples, seen = 0, set()
    for step, window in enumerate(windows):
        batch = seesaw.batch_after(samples)
        assert batch is not None
        if step >= 10 and len(window) == batch:  # the last of a pass is shorter
            growth = batch / 4
            seen.add(growth)
            if growth < 8:
                assert seesaw.lr_factor(step) == pytest.approx(math.sqrt(1 / growth))
                assert plain.lr_factor(samples // 4) <= 1 / growth + 0.02
        samples += len(window)
    assert seen == {1.0, 2.0, 4.0, 8.0}


def test_seesaw_stops_at_limit_and_rate_decays() -> None:
    one = Seesaw(0.5, max_multiple=2)
    assert [one.batch(8, factor) for factor in (1.0, 0.6, 0.5, 0.3, 0.1)] == [8, 8, 16, 16, 16]
    assert one.factor(0.5) == pytest.approx(math.sqrt(0.5))
    assert one.factor(0.1) == pytest.approx(math.sqrt(0.5) * 0.2)


def test_seesaw_requires_decaying_rate() -> None:
    with pytest.raises(InputError, match=r"--schedule constant never lowers\. Pass --schedule cosine"):
        course(global_batch=4, steps=10, schedule="constant", global_batch_schedule="seesaw 0.5")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"global_batch_schedule": "0:8", "global_batch": 4}, "exclude each other"),
        ({"global_batch_schedule": "0:8", "global_batch_tokens": 400}, "exclude each other"),
        ({"rebase_second_moment": True}, "does nothing without"),
        ({"global_batch_schedule": "3:8"}, "it must start at 0 tokens"),
    ],
)
def test_incompatible_settings_are_rejected(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TrainConfig(**settings)  # type: ignore[arg-type]


def test_schedule_round_trips_through_json() -> None:
    config = TrainConfig(global_batch_schedule="0:8 100:16").resolved()
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config
    assert config.global_batch == 8


def test_rebasing_scales_second_moment_only() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    state = optimizer.state[parameter]
    first, second = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    rescale_second_moment(optimizer, 0.5)
    assert torch.equal(state["exp_avg"], first)
    assert torch.equal(state["exp_avg_sq"], second / 2)
