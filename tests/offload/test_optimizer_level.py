"""offload="optimizer": the same bits as without it, with the state in host memory between updates."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigbatch
from bigbatch.autotune.peak_prediction import PeakPredictor
from bigbatch.offload.transfers import Transfers
from offload.models import (
    CHUNK_BYTES,
    OPTIMIZERS,
    is_in_buffers,
    loss_fn,
    make_batch,
    make_engine,
    make_model,
    plain_state,
    streamed_of,
    values,
)
from support.tiers import slow


def train(engine: bigbatch.Engine, updates: int, start: int = 0) -> list[bigbatch.WindowReport]:
    dtype = next(engine.model.parameters()).dtype
    return [engine.step(make_batch(number, 7 + number % 4, dtype)) for number in range(start, start + updates)]


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.float64), torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_updates_have_equal_bits(name: str, dtype: torch.dtype):
    engines = []
    for level in ("none", "optimizer"):
        model = make_model(dtype=dtype)
        engines.append(make_engine(model, OPTIMIZERS[name](list(model.parameters())), level))
    expected, actual = (train(engine, 20) for engine in engines)
    assert torch.equal(*(values(engine.model) for engine in engines))
    assert [r.grad_norm for r in actual] == [r.grad_norm for r in expected]
    assert [r.noise for r in actual] == [r.noise for r in expected]
    plain, streamed = (engine.accumulator.update.optimizers for engine in engines)
    assert [plain_state(o) for o in streamed] == [plain_state(o) for o in plain]


def test_state_is_in_one_buffer_per_chunk():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine = make_engine(model, optimizer)
    train(engine, 1)
    streamed = streamed_of(engine)
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert all(is_in_buffers(tensor, streamed) for tensor in moments)
    assert 3 < len({chunk.host.data_ptr() for chunk in streamed.chunks}) < len(list(model.parameters()))
    assert sum(tensor.nbytes for tensor in moments) <= streamed.host_bytes < 2 * sum(t.nbytes for t in moments) + 4096


def test_every_chunk_crosses_once_in_each_direction():
    model = make_model()
    engine = make_engine(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    train(engine, 1)
    streamed = streamed_of(engine)
    before = copy.copy(streamed.transfers.counts)
    train(engine, 1)
    after = streamed.transfers.counts
    chunks = 4
    assert after.num_to_device - before.num_to_device == after.num_to_host - before.num_to_host == chunks
    assert after.bytes_to_device - before.bytes_to_device == streamed.host_bytes
    assert after.bytes_to_host - before.bytes_to_host == streamed.host_bytes


def test_device_holds_three_slots_or_largest_chunk():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 64, bias=False), nn.Linear(64, 2, bias=False))
    engine = make_engine(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    engine.accumulator.prepare()
    largest = 2 * 4 * 8 * 64
    assert streamed_of(engine).device_bytes == max(3 * CHUNK_BYTES, largest) == largest


def test_state_exists_on_host_before_first_update():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine = make_engine(model, optimizer)
    engine.accumulator.prepare()
    streamed = streamed_of(engine)
    assert streamed.host_bytes > 0
    assert all(float(s["step"]) == 0 and not s["exp_avg"].any() for s in optimizer.state.values())


def test_state_of_trained_optimizer_moves_to_host():
    models = make_model(), make_model()
    plain = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in models]
    for model, optimizer in zip(models, plain, strict=True):
        train(make_engine(model, optimizer, "none"), 3)
    train(make_engine(models[0], plain[0], "none"), 3, start=3)
    train(make_engine(models[1], plain[1], "optimizer"), 3, start=3)
    assert torch.equal(values(models[0]), values(models[1]))


def test_parameters_without_gradient_keep_their_state():
    model = make_model()
    unused = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([*model.parameters(), unused], lr=0.01, weight_decay=0.5)
    train(make_engine(model, optimizer), 2)
    assert torch.equal(unused, torch.ones(4))
    assert float(optimizer.state[unused]["step"]) == 0


def test_group_that_is_added_between_windows_is_streamed():
    found = []
    for level in ("none", "optimizer"):
        model = make_model()
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(parameters[:4], lr=0.01)
        engine = make_engine(model, optimizer, level)
        train(engine, 2)
        optimizer.add_param_group({"params": parameters[4:], "lr": 0.02})
        train(engine, 2, start=2)
        found.append(values(model))
    assert torch.equal(*found)


def test_scheduler_sees_one_step_per_update():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(make_engine(model, optimizer, scheduler=scheduler), 2)
    assert optimizer.param_groups[0]["lr"] == 0.0025
    assert all(float(state["step"]) == 2 for state in optimizer.state.values())


def test_hooks_run_once_and_see_all_parameters():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(("pre", len(o.param_groups[0]["params"]))))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(("post", len(o.param_groups[0]["params"]))))
    train(make_engine(model, optimizer), 2)
    assert seen == [("pre", 8), ("post", 8)] * 2


def test_hook_that_changes_arguments_is_refused():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, kwargs))
    before = values(model)
    with pytest.raises(
        RuntimeError,
        match=r"^a pre-hook of AdamW\.step\(\) returns other arguments, and offload= calls step\(\) without any: "
        r"remove the hook\.$",
    ):
        train(make_engine(model, optimizer), 1)
    assert torch.equal(values(model), before)


def test_foreign_step_inside_window_is_refused():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    accumulator = bigbatch.Accumulator(model, optimizer, offload="optimizer")
    with accumulator.window() as window:
        loss_sum, items = loss_fn(model, make_batch(0))
        window.backward(loss_sum, items=items)
        with pytest.raises(bigbatch.errors.WindowStateError, match=r"^AdamW\.step\(\) was called while a window holds"):
            optimizer.step()
        window.step()


def test_own_loop_has_equal_bits():
    found = []
    for level in ("none", "optimizer"):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        accumulator = bigbatch.Accumulator(model, optimizer, max_grad_norm=0.1, offload=level)
        for window in accumulator.windows((make_batch(n) for n in range(9)), num_microbatches=2):
            for microbatch in window:
                loss_sum, items = loss_fn(model, microbatch)
                window.backward(loss_sum, items=items)
            window.step()
        found.append(values(model))
    assert torch.equal(*found)


@pytest.mark.parametrize("settings", [{"reproducible": True, "quantum": 2}, {"fuse_gradients": True}], ids=str)
def test_other_settings_have_equal_bits(settings: dict[str, Any]):
    found = []
    for level in ("none", "optimizer"):
        model = make_model()
        engine = make_engine(model, torch.optim.AdamW(model.parameters(), lr=0.01), level, **settings)
        train(engine, 4)
        found.append(values(model))
    assert torch.equal(*found)


def test_window_with_nan_changes_nothing():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine = make_engine(model, optimizer)
    train(engine, 2)
    parameters, state = values(model), plain_state(optimizer)
    counts = copy.copy(streamed_of(engine).transfers.counts)
    inputs, labels = make_batch(2)
    inputs[3, 0] = torch.nan
    assert engine.step((inputs, labels)).skipped == "non-finite gradient"
    assert torch.equal(values(model), parameters)
    assert plain_state(optimizer) == state
    assert streamed_of(engine).transfers.counts == counts


def test_microbatch_that_runs_out_of_memory_is_repeated():
    found = []
    for level in ("none", "optimizer"):
        model, calls = make_model(), []

        def failing(model: nn.Module, batch: tuple[Tensor, Tensor], calls: list[int] = calls) -> tuple[Tensor, int]:
            calls.append(len(batch[1]))
            if len(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return loss_fn(model, batch)

        engine = make_engine(model, torch.optim.AdamW(model.parameters(), lr=0.01), level, loss_fn=failing)
        assert engine.step(make_batch(0)).retries == 1
        found.append(values(model))
    assert torch.equal(*found)


def test_microbatch_is_chosen_with_offload():
    model = make_model()
    engine = make_engine(model, torch.optim.AdamW(model.parameters(), lr=0.01), microbatch="auto")
    report = engine.step(make_batch(0, 32))
    assert report.items == 32
    assert engine.choice is not None
    assert engine.choice.prediction_failure is None


def test_predicted_peak_is_without_state():
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(32)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine = make_engine(model, optimizer)
    engine.accumulator.prepare()
    offload = engine.accumulator.update.offload
    assert offload is not None

    def peak(which: Any) -> int:
        predictor = PeakPredictor.from_training(model, which, lambda m, x: (m(x).sum(), len(x)))
        return predictor.predict(torch.zeros(2, 64)).peak_bytes

    whole = sum(2 * p.nbytes for p in model.parameters())
    assert peak(optimizer) - peak(offload.without_state()) >= 0.9 * whole


def test_copied_engine_streams_a_state_of_its_own():
    model = make_model()
    engine = make_engine(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    train(engine, 1)
    other = copy.deepcopy(engine.accumulator.update)
    other.prepare()
    mine, theirs = engine.accumulator.update.offload, other.offload
    assert mine is not None
    assert theirs is not None
    assert theirs.host_bytes == mine.host_bytes
    assert theirs.streamed[0].optimizer is other.optimizers[0]
    own = {v.data_ptr() for s in mine.streamed[0].optimizer.state.values() for v in s.values()}
    assert own.isdisjoint(v.data_ptr() for s in theirs.streamed[0].optimizer.state.values() for v in s.values())


@pytest.mark.parametrize(("name", "level"), [("adamw-foreach", "optimizer"), ("adamw", "master")])
def test_chunks_of_nominal_size_arrive_while_others_are_computed(
    name: str, level: str, monkeypatch: pytest.MonkeyPatch
):
    """A third moment or master weights make a chunk larger than twice its parameters."""
    model = nn.Sequential(*[nn.Linear(8, 16, bias=False) if n % 2 else nn.Linear(16, 8, bias=False) for n in range(6)])

    def loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch).float().square().sum(), len(batch)

    engine = make_engine(model, OPTIMIZERS[name](list(model.parameters())), level, loss_fn=loss)
    engine.step(torch.randn(4, 16))
    calls: list[str] = []
    for direction in ("to_device", "to_host"):
        original = getattr(Transfers, f"_copy_{direction}")

        def noted(*words: Any, direction: str = direction, original: Any = original) -> Any:
            calls.append(direction)
            return original(*words)

        monkeypatch.setattr(Transfers, f"_copy_{direction}", noted)
    engine.step(torch.randn(4, 16))
    assert len(streamed_of(engine).chunks) == 6
    assert calls == ["to_device", *["to_device", "to_host"] * 5, "to_host"]
