"""What may be done with a window when; every illegal order says so and leaves clean gradients."""

import contextlib
import json

import pytest
import torch

import bigbatch
from bigbatch import WindowState, WindowStateError
from support import full_batch_reference as ref


def setup(**settings):
    model = ref.make_model()
    optimizer = ref.RecordingSGD(model)
    return model, optimizer, bigbatch.Accumulator(model, optimizer, **settings), ref.cut(ref.ragged_batch(8), 1)


def fill(window, model):
    for microbatch in window:
        window.backward(ref.loss_and_items(model, microbatch))


def assert_clean(model):
    assert all(p.grad is None for p in model.parameters())
    assert ref.hooks_of(model) == 0


def test_window_goes_from_empty_to_accumulating_to_closed():
    model, _, accumulator, parts = setup()
    window = accumulator.window(parts[:2])
    assert window.state is WindowState.EMPTY
    assert window.is_open
    for index, microbatch in enumerate(window):
        assert window.num_microbatches == index
        window.backward(ref.loss_and_items(model, microbatch))
        assert window.state is WindowState.ACCUMULATING
    window.step()
    assert window.state is WindowState.CLOSED
    assert not window.is_open
    assert_clean(model)


def test_second_step_raises_and_names_state():
    model, optimizer, accumulator, parts = setup()
    window = accumulator.window(parts[:2])
    fill(window, model)
    window.step()
    with pytest.raises(
        WindowStateError, match=r"window.step\(\) was called on a window that is closed. .*take the next"
    ):
        window.step()
    assert len(optimizer.recorded) == 1


def test_backward_after_step_raises_and_adds_nothing():
    model, _, accumulator, parts = setup()
    window = accumulator.window(parts[:2])
    fill(window, model)
    window.step()
    with pytest.raises(WindowStateError, match=r"window.backward\(\) was called on a window that is closed"):
        window.backward(ref.loss_and_items(model, parts[0]))
    assert_clean(model)


def test_aborted_window_is_dropped_and_rejects_backward():
    model, optimizer, accumulator, parts = setup()
    window = accumulator.window(parts[:2])
    fill(window, model)
    window.abort()
    assert window.state is WindowState.ABORTED
    assert_clean(model)
    window.abort()
    for call in (window.step, lambda: window.backward(ref.loss_and_items(model, parts[0]))):
        with pytest.raises(WindowStateError, match="a window that is aborted"):
            call()
    assert not optimizer.recorded


def test_abort_after_step_changes_nothing():
    model, _, accumulator, parts = setup()
    window = accumulator.window(parts[:2])
    fill(window, model)
    window.step()
    window.abort()
    assert window.state is WindowState.CLOSED


def test_step_on_empty_window_changes_nothing():
    _, optimizer, accumulator, _ = setup()
    report = accumulator.window().step()
    assert (report.skipped, report.num_microbatches, report.step) == ("no items", 0, 0)
    assert not optimizer.recorded


def test_missing_step_raises_at_next_window():
    model, optimizer, accumulator, parts = setup()

    def loop():
        for window in accumulator.windows(parts, num_microbatches=2):
            fill(window, model)

    with pytest.raises(
        WindowStateError, match=r"still open and holds the gradients of 2 micro-batches. Call its step\(\)"
    ):
        loop()
    assert not optimizer.recorded
    assert_clean(model)


def test_missing_step_on_last_window_raises():
    model, optimizer, accumulator, parts = setup()

    def loop():
        for number, window in enumerate(accumulator.windows(parts, num_microbatches=4)):
            fill(window, model)
            if number == 0:
                window.step()

    with pytest.raises(WindowStateError, match="still open and holds the gradients of 4 micro-batches"):
        loop()
    assert len(optimizer.recorded) == 1
    assert_clean(model)


def test_exception_in_loop_body_leaves_next_epoch_clean():
    model, optimizer, accumulator, parts = setup()

    def loop(fail):
        for window in accumulator.windows(parts, num_microbatches=8):
            for index, microbatch in enumerate(window):
                if fail and index == 3:
                    raise KeyError("the user's own")
                window.backward(ref.loss_and_items(model, microbatch))
            window.step()

    with pytest.raises(KeyError, match="the user's own"):
        loop(fail=True)
    assert_clean(model)
    loop(fail=False)
    full = ref.full_gradient(model, ref.ragged_batch(8))
    assert ref.relative_error(optimizer.recorded[0], full) <= 1e-12
    assert ref.relative_error(ref.mean_of_means_gradient(model, parts), full) > 1e-3


def test_loader_failure_inside_window_aborts_it():
    model, optimizer, accumulator, parts = setup()

    def loader():
        yield parts[0]
        raise OSError("the disk is gone")

    windows = accumulator.windows(loader(), num_microbatches=2)
    window = next(windows)
    with pytest.raises(OSError, match="the disk is gone"):
        fill(window, model)
    assert window.state is WindowState.ABORTED
    assert_clean(model)
    assert optimizer.recorded == []


def test_break_inside_window_drops_it():
    model, optimizer, accumulator, parts = setup()
    for window in accumulator.windows(parts, num_microbatches=4):
        window.backward(ref.loss_and_items(model, parts[0]))
        break
    assert window.state is WindowState.ABORTED
    assert_clean(model)
    assert not optimizer.recorded


def test_closing_generator_drops_its_open_window():
    model, _, accumulator, parts = setup()
    windows = accumulator.windows(parts, num_microbatches=4)
    window = next(windows)
    fill(window, model)
    windows.close()
    assert window.state is WindowState.ABORTED
    assert_clean(model)


def test_closing_generator_leaves_foreign_window_open():
    model, optimizer, accumulator, parts = setup()
    windows = accumulator.windows(parts, num_microbatches=2)
    first = next(windows)
    fill(first, model)
    first.step()
    window = accumulator.window()
    window.backward(ref.loss_and_items(model, parts[0]))
    windows.close()
    assert window.state is WindowState.ACCUMULATING
    window.step()
    assert len(optimizer.recorded) == 2


def test_dropped_old_generator_leaves_new_windows_open():
    """An endless loop that renews its generator: the old one is only freed when the name is bound again."""
    model, optimizer, accumulator, parts = setup()
    old = accumulator.windows(parts, num_microbatches=2)
    fill(window := next(old), model)
    window.step()
    new = accumulator.windows(parts, num_microbatches=2)
    window = next(new)
    del old
    fill(window, model)
    window.step()
    assert len(optimizer.recorded) == 2


def test_nested_window_raises_and_keeps_outer_one():
    model, optimizer, accumulator, parts = setup()
    outer = accumulator.window(parts[:2])
    fill(outer, model)
    with pytest.raises(WindowStateError, match=r"Call its step\(\), or its abort\(\)"):
        next(accumulator.windows(parts, num_microbatches=2))
    assert outer.state is WindowState.ACCUMULATING, "the message says that step() may still be called"
    outer.step()
    assert len(optimizer.recorded) == 1


def test_second_manual_window_raises_and_keeps_first():
    model, optimizer, accumulator, parts = setup()
    first = accumulator.window(parts[:2])
    fill(first, model)
    with pytest.raises(WindowStateError, match="holds the gradients of 2 micro-batches"):
        accumulator.window()
    first.step()
    assert len(optimizer.recorded) == 1


def test_open_window_without_microbatch_yields_to_next():
    _, _, accumulator, _ = setup()
    first, second = accumulator.window(), accumulator.window()
    assert first.state is WindowState.ABORTED
    assert second.state is WindowState.EMPTY


def test_failing_backward_aborts_window():
    model, optimizer, accumulator, parts = setup()
    window = accumulator.window()
    window.backward(ref.loss_and_items(model, parts[0]))

    def fail(_gradient):
        raise RuntimeError("failed half-way")

    handle = model.embedding.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="failed half-way"):
        window.backward(ref.loss_and_items(model, parts[1]))
    handle.remove()
    assert window.state is WindowState.ABORTED
    assert_clean(model)
    assert not optimizer.recorded


def test_failing_step_aborts_window_and_clears_gradients():
    model, _, accumulator, parts = setup()

    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("no disk left")

    accumulator = bigbatch.Accumulator(model, Failing(model.parameters(), lr=0.1))
    window = accumulator.window(parts[:2])
    fill(window, model)
    with pytest.raises(RuntimeError, match="no disk left"):
        window.step()
    assert window.state is WindowState.ABORTED
    assert_clean(model)
    assert accumulator.num_steps == 0


@pytest.mark.parametrize("num_microbatches", [0, -1])
def test_window_of_zero_microbatches_is_rejected(num_microbatches):
    _, _, accumulator, parts = setup()
    with pytest.raises(
        ValueError,
        match=f"num_microbatches is {num_microbatches}: it must be at least 1, the micro-batches of one window",
    ):
        accumulator.windows(parts, num_microbatches=num_microbatches)


@pytest.mark.parametrize("num_microbatches", [2.5, "4", None, True])
def test_non_integer_number_of_microbatches_is_rejected(num_microbatches):
    _, _, accumulator, parts = setup()
    with pytest.raises(TypeError, match="num_microbatches"):
        accumulator.windows(parts, num_microbatches=num_microbatches)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_inside_window_is_not_silently_wrong(set_to_none):
    """Users who change three lines forget the fourth: ``optimizer.zero_grad()`` drops what was summed."""
    model, optimizer, accumulator, parts = setup()
    window = accumulator.window()
    window.backward(ref.loss_and_items(model, parts[0]))
    optimizer.zero_grad(set_to_none=set_to_none)
    with pytest.raises(WindowStateError, match=r"changed since its last backward, by optimizer.zero_grad\(\)"):
        window.backward(ref.loss_and_items(model, parts[1]))
    assert window.state is WindowState.ABORTED
    assert_clean(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_discarded_window_leaves_no_hook(dtype):
    """A notebook makes the accumulator anew; the parameters live on."""
    model = torch.nn.Linear(2, 1, dtype=dtype)
    inputs = torch.ones(3, 2, dtype=dtype)

    def forget():
        accumulator = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
        accumulator.window().backward(model(inputs).sum(), items=3)

    forget()
    optimizer = ref.RecordingSGD(model)
    window = bigbatch.Accumulator(model, optimizer).window()
    window.backward(model(inputs).sum(), items=3)
    assert window.step().skipped is None
    assert optimizer.recorded[0]["bias"].item() == 1
    model(inputs).sum().backward()
    assert model.bias.grad.item() == 3


def test_context_manager_returns_window_and_ends_with_step():
    model, optimizer, accumulator, parts = setup()
    with accumulator.window(parts[:2]) as window:
        assert isinstance(window, bigbatch.Window)
        fill(window, model)
        window.step()
    assert window.state is WindowState.CLOSED
    assert len(optimizer.recorded) == 1


def test_error_inside_context_manager_aborts_window():
    model, optimizer, accumulator, parts = setup()
    windows = []

    def train():
        with accumulator.window() as window:
            windows.append(window)
            window.backward(ref.loss_and_items(model, parts[0]))
            raise ZeroDivisionError("the user's own")

    with pytest.raises(ZeroDivisionError, match="the user's own"):
        train()
    (window,) = windows
    assert window.state is WindowState.ABORTED
    assert_clean(model)
    assert not optimizer.recorded


@pytest.mark.parametrize("num_microbatches", [0, 2])
def test_context_manager_without_step_raises(num_microbatches):
    model, optimizer, accumulator, parts = setup()
    with pytest.raises(WindowStateError) as missing, accumulator.window(parts[:num_microbatches]) as window:
        fill(window, model)
    assert str(missing.value) == (
        f"the with block of a window ended with {num_microbatches} micro-batches that were not applied. Call "
        "window.step() at its end, or window.abort() to drop them."
    )
    assert window.state is WindowState.ABORTED
    assert_clean(model)
    assert not optimizer.recorded


def test_context_manager_accepts_abort():
    model, _, accumulator, parts = setup()
    with accumulator.window(parts[:2]) as window:
        fill(window, model)
        window.abort()
    assert window.state is WindowState.ABORTED


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_retained_graph_is_differentiated_again(dtype):
    """Truncated backpropagation through time: every chunk reaches back through the one before."""
    torch.manual_seed(0)
    model = torch.nn.LSTMCell(3, 4).to(dtype)
    steps = torch.randn(4, 2, 3).to(dtype)

    def losses():
        state = None
        for inputs in steps:
            state = model(inputs, state)
            yield state[0].float().square().sum() if dtype is torch.bfloat16 else state[0].square().sum()

    full = ref.gradients_of(model, sum(losses()) / 8)
    optimizer = ref.RecordingSGD(model)
    with bigbatch.Accumulator(model, optimizer).window() as window:
        for loss in losses():
            window.backward(loss, items=2, retain_graph=True)
        window.step()
    assert ref.relative_error(optimizer.recorded[0], full) <= (1e-12 if dtype is torch.float64 else 3e-2)


def test_second_backward_of_a_graph_names_retain_graph():
    model = torch.nn.LSTMCell(3, 4)
    window = bigbatch.Accumulator(model, ref.RecordingSGD(model)).window()
    state = model(torch.ones(2, 3))
    window.backward(state[0].square().sum(), items=2)
    with pytest.raises(WindowStateError) as caught:
        window.backward(model(torch.ones(2, 3), state)[0].square().sum(), items=2)
    assert str(caught.value) == (
        "the graph of this loss, or a part of it, was differentiated before, and its tensors were freed. Pass "
        "retain_graph=True to the earlier backward (of a window, or of an earlier step of truncated backpropagation), "
        "or detach() what comes from it; for several optimizers of one loss, pass all of them to one accumulator: "
        "Accumulator(model, [a, b])."
    )
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert window.state is WindowState.ABORTED
    assert_clean(model)


def test_parameters_added_inside_window_are_refused():
    model, optimizer, accumulator, parts = setup()
    window = accumulator.window(parts[:2])
    fill(window, model)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]})
    with pytest.raises(WindowStateError) as refused:
        window.step()
    num_parameters = len(list(model.parameters()))
    assert str(refused.value) == (
        f"the optimizer had {num_parameters} parameters when the window opened and has {num_parameters + 2} now, "
        "not all the same ones. Call add_param_group between two windows."
    )
    assert not optimizer.recorded
    assert_clean(model)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_windows_under_one_autocast_use_updated_weights(make):
    """Autocast keeps a cast of each float32 weight until its outermost context ends."""

    def run(around):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        accumulator = bigbatch.Accumulator(model, make(model.parameters(), lr=0.5))
        autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        inputs, losses = torch.ones(2, 3), []
        with autocast if around else contextlib.nullcontext():
            for _ in range(3):
                with accumulator.window() as window:
                    for row in inputs.split(1):
                        with contextlib.nullcontext() if around else torch.autocast("cpu", dtype=torch.bfloat16):
                            loss = model(row).float().square().sum()
                        window.backward(loss, items=1)
                    losses.append(window.step().loss)
        return losses

    assert run(around=True) == run(around=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", [0, 1])
def test_unfrozen_half_parameters_sum_in_float32(dtype, position):
    """Unfrozen after the window opened, or after its first micro-batch: 512 ones are not 256."""
    torch.manual_seed(0)
    model = torch.nn.ModuleList([torch.nn.Linear(1, 1) for _ in range(2)]).to(dtype)
    model[0].requires_grad_(False)
    optimizer = ref.RecordingSGD(model)
    window = bigbatch.Accumulator(model, optimizer).window()
    for index in range(512 + position):
        if index == position:
            model[0].requires_grad_(True)
        window.backward((model[0](torch.ones(1, 1, dtype=dtype)) + model[1].bias).sum(), items=1)
        assert model[0].bias.grad is None
    window.step()
    assert optimizer.recorded[0]["0.bias"].item() == pytest.approx(512 / (512 + position), rel=4e-3)


def test_model_converted_after_opening_sums_in_float32():
    model = torch.nn.Linear(1, 1)
    optimizer = ref.RecordingSGD(model)
    window = bigbatch.Accumulator(model, optimizer).window()
    model.to(torch.bfloat16)
    for _ in range(512):
        window.backward(model(torch.ones(1, 1, dtype=torch.bfloat16)).sum(), items=1)
    window.step()
    assert optimizer.recorded[0]["bias"].item() == 1


@pytest.mark.parametrize("count", ["uint8(200)", "int16(20_000)", "uint16(60_000)"])
def test_numpy_counts_of_terms_do_not_wrap(count):
    numpy = pytest.importorskip("numpy")
    model = torch.nn.Linear(1, 1)
    optimizer = ref.RecordingSGD(model)
    narrow = eval(f"numpy.{count}", {"numpy": numpy})
    accumulator = bigbatch.Accumulator(model, optimizer)
    inputs = [torch.ones(1, 1)] * 7
    for window in accumulator.windows(inputs, num_microbatches=7, count_items=lambda _: {"a": narrow}):
        for part in window:
            window.backward({"a": (model(part).sum() * int(narrow), narrow)})
        report = window.step()
    assert report.items == 7 * int(narrow)
    assert optimizer.recorded[0]["bias"].item() == pytest.approx(1)


EARLY = (
    "a window of 3 micro-batches was ended after 1, and there were more: its step() or finish() is within the loop "
    "over its micro-batches, so that updates have fewer than num_microbatches. Call it after that loop; to end a "
    "window early on purpose, leave that loop by break."
)


def run_windows(end):
    """Run windows of three micro-batches of eight; ``end(window, number)`` is called after each backward."""
    model, optimizer, accumulator, parts = setup()
    for window in accumulator.windows(parts, num_microbatches=3):
        for number, microbatch in enumerate(window):
            window.backward(ref.loss_and_items(model, microbatch))
            if end(window, number):
                break
        if window.is_open:
            window.step()
    return len(optimizer.recorded)


@pytest.mark.parametrize("call", ["step", "finish"])
def test_window_that_is_ended_within_its_loop_is_warned_of_once(call):
    with pytest.warns(UserWarning, match="was ended after") as caught:
        run_windows(lambda window, _: getattr(window, call)() is None)
    assert [str(warning.message) for warning in caught] == [EARLY]
    assert caught[0].filename == __file__


def test_windows_that_are_short_by_right_are_not_warned_of():
    """The last one of a loader, those that are dropped, and those left by break; warnings are errors."""

    def abort(window, _):
        window.abort()
        return True

    assert run_windows(lambda *_: False) == 3
    assert run_windows(lambda _, number: number == 1) == 4
    assert run_windows(abort) == 0


def test_window_that_is_stepped_with_its_last_microbatch_is_not_warned_of():
    def step_last(window, number):
        if number == 2:
            window.step()

    assert run_windows(step_last) == 3


def test_report_as_dict_has_plain_values():
    model, _, accumulator, parts = setup()
    window = accumulator.window(parts[:2])
    fill(window, model)
    report = window.step()
    found = json.loads(json.dumps(report.as_dict()))
    assert found["loss"] == report.loss
    assert found["terms"] == {"loss": {"loss": report.loss, "items": report.items}}
    assert (found["step"], found["items"], found["ranks"], found["skipped"]) == (1, report.items, None, None)
    assert set(found) >= {"grad_norm", "num_microbatches", "elapsed_s", "peak_bytes", "noise"}
