"""Updates that are the same bits for every micro-batch and every order of quanta, and what cannot be so."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bigbatch
from bigbatch.engine.microbatch_size import MicrobatchSize
from bigbatch.engine.quanta import check_quanta
from bigbatch.errors import InputError, MemoryLimitError
from support.reproducible_runs import KINDS, Run, collate, fingerprint, train
from support.tiers import slow_except

WAYS = [
    {"microbatch": 4},
    {"microbatch": 16, "order": 1},
    {"microbatch": 8, "order": 2, "fails": (4, 7, 30, 51, 57)},
]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("kind", "precision"), slow_except(KINDS, ("gpt2", "float32")))
def test_micro_batch_order_and_memory_change_no_bit(kind: str, precision: str):
    run = Run(kind, precision, updates=6)
    expected = train(run)
    assert len(set(expected.fingerprints)) == 6
    for way in WAYS:
        found = train(replace(run, **way))
        assert found.same(expected), way
        assert found.retries == len(way.get("fails", ()))


def test_default_mode_depends_on_order():
    run, default = Run(updates=4), {"reproducible": False, "quantum": None}
    expected = train(run, **default)
    assert train(run, **default).same(expected)
    assert not train(replace(run, order=1), **default).same(expected)


def test_resumed_run_is_same_bits(tmp_path: Path):
    expected = train(Run(updates=6))
    train(Run(updates=4), saved=tmp_path / "state")
    resumed = train(Run(updates=6, microbatch=8, order=3), saved=tmp_path / "state")
    assert resumed.same(expected.after(3))


def squares(model: nn.Module, rows: Tensor) -> tuple[Tensor, int]:
    return model(rows).square().sum(), len(rows)


def linear_engine(**settings: object) -> bigbatch.Engine:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"microbatch": 4, "reproducible": True, "quantum": 2, "check": False, **settings}
    return bigbatch.Engine(model, optimizer, squares, **settings)  # type: ignore[arg-type]


def rows(samples: int = 10, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(samples, 4, generator=torch.Generator().manual_seed(seed)) * scale


def sum_of_quanta(model: nn.Module, batch: Tensor) -> Tensor:
    """The exact sum, in float64, of the float32 gradients of the weight over quanta of 2."""
    total = torch.zeros(3, 4, dtype=torch.float64)
    for part in batch.split(2):
        (gradient,) = torch.autograd.grad(squares(model, part)[0], [model.weight])
        total += gradient.double()
    return total / len(batch)


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1e-4), (1.0, 1e4, 1e-4), (1e-10, 1e-12, 1e8)])
def test_gradient_is_rounded_once_to_float32(scales: tuple[float, ...]):
    engine = linear_engine()
    weight = engine.model.weight
    for number, scale in enumerate(scales):
        batch = rows(scale=scale, seed=number)
        engine.backward(batch)
        expected = sum_of_quanta(engine.model, batch)
        largest = expected.abs().max()
        assert ((weight.grad.double() - expected).abs() <= expected.abs() * 2.0**-23 + largest * 2.0**-30).all()
        weight.grad = None


def test_dropout_of_next_window_differs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.5), nn.Linear(32, 1))
    engine = bigbatch.Engine(model, None, squares, microbatch=2, reproducible=True, quantum=2, check=False)
    losses = [engine.backward(rows()).loss for _ in range(3)]
    assert len(set(losses)) == 3


def test_random_state_of_loop_is_left_alone():
    engine = linear_engine()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    engine.step(rows())
    assert torch.equal(torch.rand(2), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_non_finite_gradient_skips_the_window():
    engine = linear_engine()
    engine.step(rows())
    before = fingerprint(engine.model)
    scales = engine.state_dict()["engine"]["reproducible"]["scales"]
    bad = rows()
    bad[7] = torch.inf
    report = engine.step(bad)
    assert report.skipped == "non-finite gradient"
    assert fingerprint(engine.model) == before
    state = engine.state_dict()["engine"]["reproducible"]
    assert (state["scales"], state["num_windows"]) == (scales, 2)
    assert engine.step(rows()).skipped is None


def test_window_without_items_changes_nothing():
    engine = linear_engine()
    before = fingerprint(engine.model)
    assert engine.step(rows(0)).skipped == "no items"
    assert fingerprint(engine.model) == before
    assert engine.step(rows()).step == 1


def test_several_terms_are_same_bits():
    def loss_fn(model: nn.Module, batch: Tensor) -> dict[str, tuple[Tensor, int]]:
        out = model(batch)
        return {"a": (out.square().sum(), len(batch)), "b": (out.abs().sum(), 3 * len(batch))}

    found = set()
    for microbatch in (2, 6):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        engine = bigbatch.Engine(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            loss_fn,
            microbatch=microbatch,
            reproducible=True,
            quantum=2,
            check=False,
            count_items=lambda batch: {"a": len(batch), "b": 3 * len(batch)},
        )
        reports = [engine.step(rows(seed=seed)) for seed in range(3)]
        found.add((fingerprint(model), tuple(report.loss for report in reports)))
    assert len(found) == 1


def test_token_budget_above_a_quantum_changes_no_bit():
    sizes = {"lengths": lambda samples: [len(sample) for sample in samples]}
    budgets = [bigbatch.TokenBudget(tokens) for tokens in (24, 64)]
    found = [train(Run(updates=3), microbatch=budget, **sizes) for budget in budgets]
    assert found[0].same(found[1])
    with pytest.raises(ValueError, match="quantum") as refused:
        train(Run(updates=3), microbatch=bigbatch.TokenBudget(12), **sizes)
    assert str(refused.value) == (
        "samples 0 to 1 of the batch are a quantum of 20 tokens, above microbatch=TokenBudget(12): pass a larger "
        "micro-batch, or a smaller quantum."
    )


def test_quantum_that_never_fits_is_not_split():
    calls = []

    def loss_fn(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        calls.append(len(batch))
        if len(calls) > 2:
            raise torch.OutOfMemoryError("full")
        return squares(model, batch)

    model = nn.Linear(4, 3)
    engine = bigbatch.Engine(
        model, torch.optim.SGD(model.parameters()), loss_fn, microbatch=2, reproducible=True, quantum=2, check=False
    )
    with pytest.raises(MemoryLimitError) as refused:
        engine.step(rows())
    assert str(refused.value) == (
        "samples 4 to 5 of the batch, a quantum, do not fit in memory (full): a quantum is never split, so start a new "
        "run with a smaller quantum, or use activation checkpointing."
    )
    assert calls == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        (
            {"microbatch": 3},
            ValueError,
            "microbatch=3 is no whole number of quanta of 2 samples: pass a multiple, such as 2.",
        ),
        (
            {"microbatch": 1},
            ValueError,
            "microbatch=1 is no whole number of quanta of 2 samples: pass a multiple, such as 2.",
        ),
        (
            {"quantum": None},
            ValueError,
            "reproducible=True needs quantum=, the number of consecutive samples that are computed together whatever "
            "the micro-batch is: pass for example quantum=2.",
        ),
        (
            {"reproducible": False},
            ValueError,
            "quantum=2 has no effect without reproducible=True: pass both, or neither.",
        ),
        (
            {"batch_norm": "exact"},
            InputError,
            'reproducible=True computes each quantum by itself, and does not support batch_norm="exact": remove one of '
            "the two.",
        ),
        (
            {"scaler": torch.amp.GradScaler("cpu")},
            InputError,
            "reproducible=True is not supported with a GradScaler, whose scale depends on the history of the run: use "
            "bfloat16, and leave scaler= out.",
        ),
    ],
)
def test_settings_are_refused_in_one_sentence(settings: dict[str, object], error: type[Exception], sentence: str):
    with pytest.raises(error) as refused:
        linear_engine(**settings)
    assert str(refused.value) == sentence


COMPILED = (
    "torch.compile chooses the order of sums by timing and by the shapes that come first, which differ between runs "
    "and ranks. Pass the model before it is compiled."
)


class TwoSteps(torch.optim.SGD):
    """Needs the gradient twice."""

    def step(self, closure):  # type: ignore[no-untyped-def, override]
        super().step(closure)
        super().step(closure)


def refused_model(kind: str) -> tuple[nn.Module, type[torch.optim.Optimizer]]:
    if kind == "float64":
        return nn.Linear(4, 3).double(), torch.optim.SGD
    if kind == "norm":
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.optim.SGD
    if kind == "compiled":
        return torch.compile(nn.Linear(4, 3), backend="eager"), torch.optim.SGD  # type: ignore[return-value]
    if kind == "compiled layer":
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
        model[1].compile(backend="eager")
        return model, torch.optim.SGD
    return nn.Linear(4, 3), TwoSteps


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (
            "float64",
            "reproducible=True sums gradients of float32 and bfloat16 as integers, and parameter 1 of 2 is float64: "
            "convert the model.",
        ),
        (
            "norm",
            "reproducible=True is not supported for the BatchNorm1d '1', whose running statistics depend on the order "
            "of the micro-batches: use a norm over each sample, such as GroupNorm, or call its eval().",
        ),
        (
            "compiled",
            f"reproducible=True is not supported for a compiled model: {COMPILED}",
        ),
        (
            "compiled layer",
            f"reproducible=True is not supported for the compiled module '1': {COMPILED}",
        ),
        (
            "closure",
            "reproducible=True runs the micro-batches of an update once, and an optimizer here calls a closure that "
            "runs them again: use another optimizer.",
        ),
    ],
)
def test_models_and_optimizers_are_refused_in_one_sentence(kind: str, sentence: str):
    model, optimizer = refused_model(kind)
    with pytest.raises(InputError) as refused:
        bigbatch.Accumulator(model, optimizer(model.parameters(), lr=0.1), reproducible=True)
    assert str(refused.value) == sentence


def test_state_of_other_mode_or_quantum_is_refused():
    engine, other, default = linear_engine(), linear_engine(quantum=4), linear_engine(reproducible=False, quantum=None)
    engine.step(rows())
    state = engine.state_dict()
    with pytest.raises(ValueError, match="quantum") as refused:
        other.load_state_dict(state)
    assert str(refused.value) == (
        "the state is of an engine with quantum=2, and this one has quantum=4: pass quantum=2, since the next updates "
        "would have other bits."
    )
    with pytest.raises(ValueError, match="reproducible") as refused:
        default.load_state_dict(state)
    assert str(refused.value) == (
        "the state is of an engine with reproducible=True, and this one was made without it: make it as that one, "
        "since the next updates would have other bits."
    )
    with pytest.raises(ValueError, match="was made with it"):
        engine.load_state_dict(default.state_dict())


def test_state_of_other_threads_is_refused():
    engine = linear_engine()
    engine.step(rows())
    state = engine.state_dict()
    state["engine"]["reproducible"]["num_threads"] = 5
    with pytest.raises(ValueError, match="threads") as refused:
        engine.load_state_dict(state)
    assert str(refused.value) == (
        "the state was made with 5 threads in each process, and this process has 1, with which sums round differently: "
        "call torch.set_num_threads(5), or set OMP_NUM_THREADS=5."
    )


@pytest.mark.parametrize("damage", [{"seed": -1}, {"num_windows": 0.5}, {"scales": [{}]}, {"scales": None}])
def test_damaged_state_is_refused(damage: dict[str, object]):
    engine = linear_engine()
    engine.step(rows())
    state = engine.state_dict()
    state["engine"]["reproducible"] = {**state["engine"]["reproducible"], **damage}
    with pytest.raises(ValueError, match=r"reproducible\.[a-z_]+ "):
        engine.load_state_dict(state)


def windows_of(accumulator: bigbatch.Accumulator, microbatches: list[Tensor], number: int) -> list[int]:
    """Run windows in a loop of one's own; return how often each window yielded."""
    counts = []
    for window in accumulator.windows(microbatches, num_microbatches=number):
        counts.append(0)
        for part in window:
            counts[-1] += 1
            window.backward(squares(accumulator.model, part)[0], items=len(part))
        window.step()
    return counts


def test_accumulator_is_same_bits_in_any_order():
    batches = [list(rows(9, seed=seed).split(2)) for seed in range(4)]
    found = []
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [1, 0, 3, 4, 2]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        accumulator = bigbatch.Accumulator(model, optimizer, max_grad_norm=0.5, reproducible=True)
        assert windows_of(accumulator, [batch[i] for batch in batches for i in order], 5) == [10, 5, 5, 5]
        found.append(fingerprint(model))
    assert len(set(found)) == 1


def test_window_without_iteration_asks_for_another():
    model = nn.Linear(4, 3)
    accumulator = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), reproducible=True)
    for attempt in range(2):
        window = accumulator.window()
        window.backward(squares(model, rows())[0], items=10)
        if attempt:
            assert window.step().step == 1
            continue
        with pytest.raises(bigbatch.WindowStateError) as refused:
            window.step()
        assert str(refused.value) == (
            "the gradients of this window have other magnitudes than those of the windows before, and its "
            "micro-batches cannot be run again from here: run them in a new window, whose scales suit them, or iterate "
            "over a window of accumulator.windows(...) or accumulator.window(microbatches), which then yields them "
            "once more."
        )


def test_loss_before_the_iteration_is_not_lost():
    model = nn.Linear(4, 3)
    accumulator = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), reproducible=True)
    window = accumulator.window(rows().split(5))
    with pytest.raises(bigbatch.WindowStateError, match="other magnitudes"):  # noqa: PT012 - the loop raises at its end
        window.backward(squares(model, rows(3))[0], items=3)
        for part in window:
            window.backward(squares(model, part)[0], items=len(part))
    assert window.state is bigbatch.WindowState.ABORTED


def test_accumulator_state_holds_scales():
    model = nn.Linear(4, 3)
    accumulator = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.0), reproducible=True)
    assert windows_of(accumulator, list(rows().split(2)), 5) == [10]
    resumed = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.0), reproducible=True)
    assert accumulator.reproducible is not None
    assert resumed.reproducible is not None
    resumed.reproducible.load_state_dict(accumulator.reproducible.state_dict())
    assert windows_of(resumed, list(rows().split(2)), 5) == [5]


def test_sparse_gradient_is_refused():
    model = nn.Embedding(5, 3, sparse=True)
    accumulator = bigbatch.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), reproducible=True)
    with pytest.raises(TypeError) as refused:
        accumulator.window().backward(model(torch.tensor([1, 2])).sum(), items=2)
    assert str(refused.value) == (
        "a gradient is sparse, and reproducible=True sums dense gradients: use embeddings with sparse=False."
    )


def test_collate_pads_each_quantum_by_itself():
    seen = []

    def noting(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
        seen.append(len(samples))
        return collate(samples)

    train(Run(updates=1, microbatch=8, samples=5), collate=noting)
    assert seen == [2, 2, 1] * 2, "the first window is run twice: first to find its magnitudes"


@pytest.mark.filterwarnings("error")
def test_dropout_is_no_warning_of_the_first_window():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    settings = {"microbatch": 2, "reproducible": True, "quantum": 2}
    bigbatch.Engine(model, None, squares, **settings).backward(rows())  # type: ignore[arg-type]
    mean = bigbatch.Engine(model, None, lambda m, x: (m(x).square().mean(), len(x)), **settings)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="mean"):
        mean.backward(rows())


def test_quantum_above_the_chosen_micro_batch_is_refused():
    size = MicrobatchSize("auto", has_lengths=False, layout="padded")
    with pytest.raises(MemoryLimitError) as refused:
        check_quanta([range(4, 8)], None, size)
    assert str(refused.value) == (
        "samples 4 to 7 of the batch are a quantum of 4 samples, and micro-batches of 0 samples fit in memory: pass a "
        "smaller quantum."
    )
