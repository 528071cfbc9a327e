"""Windows that cannot run, fail, are interrupted or run out of memory: sentences, state and threads afterwards."""

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bigbatch
from batch_norm.models import (
    NUM_SAMPLES,
    TOLERANCE,
    WIDTH,
    Batch,
    Small,
    buffer_error,
    engine_of,
    gradient_error,
    norms,
    plain,
    rows,
    squares,
    whole,
)
from support.tiers import slow_except

ORDER = (
    'batch_norm="exact" needs every micro-batch to run the same batch norms in the same order. Take branches that '
    "depend on the data out of the model, or leave batch_norm= out."
)


def state_of(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in (*model.state_dict().values(), torch.get_rng_state())]


def assert_unchanged(model: nn.Module, before: list[Tensor]) -> None:
    assert all(map(torch.equal, state_of(model), before))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert threading.active_count() == 1


def message_of(model: nn.Module, loss_fn: Any = squares, cut: int = 4, batch: Batch | None = None) -> str:
    """Return the sentence of a window that is refused; the model is as before, and no thread is left."""
    before = state_of(model)
    with pytest.raises(bigbatch.InputError) as caught:
        engine_of(model, loss_fn, cut).backward(rows() if batch is None else batch)
    assert_unchanged(model, before)
    return str(caught.value)


def last_differs(one: Callable[[Any, Tensor], Tensor], other: Callable[[Any, Tensor], Tensor]) -> Small:
    """Run one function for micro-batches of four samples, and another for the last one of three."""
    return Small(lambda model, x: (one if len(x) == 4 else other)(model, x), other=nn.BatchNorm1d(WIDTH))


def with_other(model: Any, x: Tensor) -> Tensor:
    return model.last(model.other(model.first(x)).tanh())


def with_both(model: Any, x: Tensor) -> Tensor:
    return plain(model, model.other(model.norm(x)))


def without_norm(model: Any, x: Tensor) -> Tensor:
    return model.last(model.first(x))


@pytest.mark.parametrize(
    ("one", "other", "found", "first"),
    [
        (plain, with_other, "the batch norm 'other'", "the batch norm 'norm'"),
        (plain, without_norm, "the end", "the batch norm 'norm'"),
        (without_norm, plain, "the batch norm 'norm'", "the end"),
    ],
    ids=["another norm", "no norm", "one norm more"],
)
def test_other_order_of_norms_is_refused(one: Any, other: Any, found: str, first: str) -> None:
    message = message_of(last_differs(one, other))
    assert message == f"micro-batch 3 reaches {found}, and micro-batch 1 reaches {first}: {ORDER}"


def test_loss_without_gradient_names_remedy() -> None:
    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, int]:
        loss_sum, items = squares(model, batch)
        return (loss_sum, items) if len(batch[0]) == 4 else (loss_sum * float("nan"), 0)

    assert message_of(Small(plain), loss_fn) == (
        f"micro-batch 3 reaches the end, and micro-batch 1 reaches the backward of the batch norm 'norm': {ORDER} A "
        "loss without items needs a gradient, too: return the sum over nothing."
    )


class OwnKernel(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.native_batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, True, 0.1, self.eps
        )[0]


def test_norm_with_own_kernel_is_refused() -> None:
    assert message_of(Small(plain, norm=OwnKernel(WIDTH))) == (
        "the batch norm 'norm' (OwnKernel) normalizes by other means than torch.nn.functional.batch_norm, or in "
        'another thread, so batch_norm="exact" cannot replace its statistics: use a norm of torch.nn, or leave '
        "batch_norm= out."
    )


def test_norm_twice_in_checkpoint_is_refused() -> None:
    def twice(model: Any, x: Tensor) -> Tensor:
        return checkpoint(lambda h: plain(model, plain(model, h)), x, use_reentrant=False)

    assert message_of(Small(twice)) == (
        "the batch norm 'norm' runs inside an activation checkpoint, and 2 times in the forward of a micro-batch: "
        'batch_norm="exact" cannot know which of them is repeated. Take it out of the checkpoint, or use one module '
        "for each call."
    )


def test_penalty_on_gradients_is_refused() -> None:
    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, int]:
        inputs = batch[0].clone().requires_grad_()
        loss_sum, items = squares(model, (inputs, batch[1]))
        (gradient,) = torch.autograd.grad(loss_sum, inputs, create_graph=True)
        return loss_sum + gradient.square().sum(), items

    assert message_of(Small(plain), loss_fn) == (
        'a gradient through a batch norm is computed with create_graph=True, and with batch_norm="exact" it has no '
        "graph: leave the penalty on gradients out of loss_fn, or leave batch_norm= out."
    )


def test_one_value_in_whole_batch_is_refused() -> None:
    def drops(model: Any, batch: Batch) -> tuple[Tensor, int]:
        return squares(model, (batch[0][: 2 - len(batch[0])], batch[1][: 2 - len(batch[1])]))

    batch = tuple(values.index_select(0, torch.arange(3)) for values in rows())
    assert message_of(Small(plain), drops, cut=2, batch=batch) == (
        "the batch norm 'norm' receives a single value of each channel in the whole batch, which has no variance: pass "
        "more samples."
    )


COMPILED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "model": (lambda: torch.compile(Small(plain)), "the model (OptimizedModule) is compiled"),
    "module": (
        lambda: Small(plain, norm=torch.compile(nn.BatchNorm1d(WIDTH))),
        "the module 'norm' (OptimizedModule) is compiled",
    ),
    "script": (
        lambda: Small(plain, norm=torch.jit.script(nn.BatchNorm1d(WIDTH))),
        "the module 'norm' (RecursiveScriptModule) is compiled by torch.jit",
    ),
}


@pytest.mark.parametrize(("make", "what"), COMPILED.values(), ids=COMPILED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models_are_refused(make: Any, what: str) -> None:
    with pytest.raises(bigbatch.InputError) as caught:
        engine_of(make(), squares, 4)
    assert str(caught.value) == (
        f'{what}, and batch_norm="exact" cannot stop inside compiled code, where micro-batches wait for each other: '
        "pass what was compiled, or leave batch_norm= out."
    )


def test_model_compiled_after_engine_is_refused() -> None:
    model = Small(plain)
    engine = engine_of(model, squares, 4)
    model.compile()
    with pytest.raises(bigbatch.InputError, match="is compiled"):
        engine.backward(rows())


COUPLED = bigbatch.Coupled(lambda model, batch: model(batch), lambda _model, features: features.sum())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"batch_norm": "all"}, "batch_norm is 'all': it must be \"exact\", or left out."),
        (
            {"microbatch": "auto"},
            'microbatch="auto" measures one micro-batch, and with batch_norm="exact" the memory depends on the whole '
            "batch: pass a number of samples, or a TokenBudget.",
        ),
        (
            {"cuda_graphs": True},
            'cuda_graphs=True is not supported with batch_norm="exact", where micro-batches wait for each other within '
            "their forward: remove one of the two.",
        ),
        (
            {"loss_fn": COUPLED},
            'batch_norm="exact" is not supported for a Coupled loss, which encodes each micro-batch twice: use layer '
            "or group norm in encode; batch norm in its loss is exact without it.",
        ),
    ],
    ids=["other value", "auto", "graphs", "coupled"],
)
def test_settings_that_exclude_it_are_refused(settings: dict[str, Any], sentence: str) -> None:
    arguments = {"loss_fn": squares, "microbatch": 4, "batch_norm": "exact", **settings}
    with pytest.raises(bigbatch.InputError) as caught:
        bigbatch.Engine(Small(plain), None, **arguments)
    assert str(caught.value) == sentence


class Broken:
    """Raises an error in one micro-batch at one place."""

    def __init__(self, where: str, error: BaseException) -> None:
        self.where, self.error = where, error

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        is_last = len(batch[0]) == 3
        if is_last and self.where == "before":
            raise self.error
        loss_sum, items = squares(model, batch)
        if is_last and self.where == "after":
            raise self.error
        if is_last and self.where == "backward":
            loss_sum.register_hook(self._fail)
        return loss_sum, items

    def _fail(self, _gradient: Tensor) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error", [ArithmeticError("broken"), KeyboardInterrupt(), SystemExit(3)], ids=["error", "interrupt", "exit"]
)
@pytest.mark.parametrize("where", ["before", "after", "backward"])
def test_error_in_one_micro_batch_changes_nothing(where: str, error: BaseException) -> None:
    model, broken = Small(plain), Broken(where, error)
    before = state_of(model)
    engine = engine_of(model, broken, 4)
    with pytest.raises(type(error)) as caught:
        engine.backward(rows())
    assert caught.value is error
    assert_unchanged(model, before)
    broken.where = "nowhere"
    engine.backward(rows())
    assert gradient_error(model, whole(Small(plain), squares, [rows()])) <= TOLERANCE


def test_cleanup_of_loss_that_runs_a_norm_ends() -> None:
    class Cleans:
        ended = 0

        def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
            if len(batch[0]) == 3:
                raise ArithmeticError("broken")
            try:
                return squares(model, batch)
            finally:
                self.ended += 1
                model(batch[0])

    cleans = Cleans()
    with pytest.raises(ArithmeticError, match="broken"):
        engine_of(Small(plain), cleans, 4).backward(rows())
    assert cleans.ended == 2
    assert threading.active_count() == 1


def test_update_that_fails_puts_statistics_back() -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise ArithmeticError("broken")

    model = Small(plain)
    before = state_of(model)
    engine = bigbatch.Engine(model, Fails(model.parameters(), 0.1), squares, microbatch=4, batch_norm="exact")
    with pytest.raises((ArithmeticError, RuntimeError)):
        engine.step(rows())
    assert all(map(torch.equal, state_of(model)[:-1], before[:-1]))


@pytest.mark.parametrize("call", range(6))
def test_abandoned_window_changes_nothing(call: int) -> None:
    model, calls = Small(plain), iter(range(99))
    before = state_of(model)
    with pytest.raises(bigbatch.WindowAbandonedError):
        engine_of(model, squares, 4).backward(rows(), should_abandon=lambda: next(calls) == call)
    assert_unchanged(model, before)


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line that the main thread runs in some files."""

    def __init__(self, number: int) -> None:
        self.number, self.num_lines = number, 0

    def __call__(self, frame: FrameType, event: str, _argument: object) -> Any:
        name = Path(frame.f_code.co_filename)
        if name.parent.name != "batch_norm" or "bigbatch" not in name.parts:
            return None
        if event == "line":
            self.num_lines += 1
            if self.num_lines == self.number:
                signal.raise_signal(signal.SIGINT)
        return self


def interrupted(engine: bigbatch.Engine, number: int) -> int | None:
    """Run a window that is interrupted at a line; return how many lines it has if it is not."""
    interrupter = Interrupter(number)
    tracer, handler = sys.gettrace(), signal.signal(signal.SIGINT, signal.default_int_handler)  # also in the background
    sys.settrace(interrupter)
    try:
        engine.backward(rows())
        return interrupter.num_lines
    except KeyboardInterrupt:
        return None
    finally:
        sys.settrace(tracer)
        signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("part", slow_except(range(4), 0))
def test_interrupts_leave_no_thread_and_no_state(part: int) -> None:
    expected, num_threads = whole(Small(plain), squares, [rows()]), threading.active_count()
    num_lines = interrupted(engine_of(Small(plain), squares, 4), -1)
    assert num_lines is not None
    assert num_lines > 500
    for number in range(1 + part, num_lines, 16):
        model = Small(plain)
        before, engine = state_of(model), engine_of(model, squares, 4)
        assert interrupted(engine, number) is None
        assert all(not norm._forward_hooks and not norm._forward_pre_hooks for norm in norms(model)), number
        if model.last.weight.grad is None:  # else the window had ended
            assert all(map(torch.equal, state_of(model)[:-1], before[:-1])), number
            engine.backward(rows())
        assert gradient_error(model, expected) <= TOLERANCE
        assert buffer_error(model, expected) <= 1e-14
        engine.release_cuda_graphs()
        assert threading.active_count() == num_threads, number


class FitsOnly:
    """Runs out of memory above some samples, in the forward or in the backward."""

    def __init__(self, fits: int, where: str) -> None:
        self.fits, self.where, self.sizes = fits, where, list[int]()

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        self.sizes.append(len(batch[0]))
        loss_sum, items = squares(model, batch)
        if len(batch[0]) > self.fits:
            if self.where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory")
            loss_sum.register_hook(self._fail)
        return loss_sum, items

    def _fail(self, _gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("cut", "used"), [(4, [2, 2, 2, 2, 2, 1]), (NUM_SAMPLES, [3, 3, 3, 2])], ids=["cut", "whole"])
def test_out_of_memory_starts_again_with_halves(cut: int, used: list[int], where: str) -> None:
    model, loss_fn = Small(plain), FitsOnly(max(used), where)
    expected = whole(model, squares, [rows()])
    report = engine_of(model, loss_fn, cut).backward(rows())
    assert loss_fn.sizes[-len(used) :] == used
    assert report.num_microbatches == len(used)
    assert report.retries == (1 if cut == 4 else 2)
    assert gradient_error(model, expected) <= TOLERANCE
    assert buffer_error(model, expected) <= 1e-14


def test_single_sample_out_of_memory_is_named() -> None:
    model = Small(plain)
    before = state_of(model)
    with pytest.raises(bigbatch.MemoryLimitError, match="sample 0 of the batch does not fit"):
        engine_of(model, FitsOnly(0, "forward"), 4).backward(rows())
    assert_unchanged(model, before)


def test_first_window_warns_of_other_causes_only() -> None:
    dropped = Small(lambda m, x: m.drop(plain(m, x)), drop=nn.Dropout(0.5))
    with pytest.warns(UserWarning, match="dropout") as caught:
        bigbatch.Engine(dropped, None, squares, microbatch=4, batch_norm="exact").backward(rows())
    assert "BatchNorm" not in str(caught[0].message)
    bigbatch.Engine(Small(plain), None, squares, microbatch=4, batch_norm="exact").backward(rows())
