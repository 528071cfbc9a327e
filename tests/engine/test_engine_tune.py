"""`Engine.tune`: what it takes fits, and nothing but the micro-batch is different afterwards."""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

import bigbatch
from bigbatch import Engine, MemoryLimitError, TokenBudget
from bigbatch.autotune import choice, probe
from bigbatch.autotune.choice import MicrobatchChoice, describe_parts
from bigbatch.autotune.peak_prediction import PeakPredictor, state_of
from bigbatch.engine import tuning
from bigbatch.memory import usage
from bigbatch.memory.limit import MIB, describe_bytes
from bigbatch.memory.usage import resolve_memory_budget
from support.decoder_model import (
    CPU,
    IGNORED,
    VOCABULARY,
    Decoder,
    adamw,
    collate,
    lengths_of,
    loss_fn,
    make,
    samples,
    tracked,
)
from support.tiers import slow

LISTED: dict[str, Any] = {"collate": collate}
BY_LENGTH: dict[str, Any] = {"collate": collate, "lengths": lengths_of}


@pytest.fixture(autouse=True)
def _time_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks at the time."""
    monkeypatch.setattr(probe, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(choice, "MAX_PROBING_S", float("inf"))


def engine_of(model: nn.Module, loss: Any = loss_fn, **settings: Any) -> Engine:
    return Engine(model, adamw(model), loss, check=False, **settings)


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine, int], Engine]:
    """Ask for so much memory that tensors may take some bytes of it, whatever this process holds besides."""
    resident_bytes = 2**30
    monkeypatch.setattr(usage, "_resident_bytes", lambda: resident_bytes)

    def ask(engine: Engine, usable_bytes: int) -> Engine:
        engine.accumulator.prepare()
        optimizer = engine.accumulator.optimizer
        held = [*engine.model.parameters(), *engine.model.buffers(), *state_of(optimizer)]
        others_bytes = resident_bytes - sum(tensor.nbytes for tensor in held)
        engine.memory = others_bytes + -(-usable_bytes * 100 // 95)
        assert resolve_memory_budget(engine.memory, CPU, held).usable_bytes in range(usable_bytes, usable_bytes + 2)
        return engine

    return ask


Limit: TypeAlias = Callable[[Engine, int], Engine]


def peak_of_a_step(engine: Engine, batch: Any) -> int:
    return tracked(engine.model, engine.accumulator.optimizer, lambda: engine.step(batch)).peak_bytes


MANY = samples(*[96] * 40, *range(8, 72))


# what is chosen fits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [slow(LISTED), BY_LENGTH], ids=["samples", "tokens"])
@pytest.mark.parametrize("loss", ["predicted", slow("tried")])
def test_step_stays_within_requested_memory(settings: dict[str, Any], loss: str, limit: Limit) -> None:
    """With the size that was chosen, and with the largest: memory alone decides about that."""
    usable = 16 * MIB
    engine = limit(engine_of(make(width=64), loss_fn if loss == "predicted" else selecting, **settings), usable)
    chosen = engine.tune(MANY)
    assert (chosen.prediction_failure is None) is (loss == "predicted")
    assert chosen.unit == ("tokens" if settings is BY_LENGTH else "samples")
    assert chosen.peak_bytes <= usable
    for size in (chosen.size, chosen.largest):
        engine.set_microbatch(replace(chosen, size=size))
        assert peak_of_a_step(engine, MANY) <= 1.005 * usable
    assert peak_of_a_step(engine, MANY) >= 0.8 * usable, "the largest uses what there is"
    engine.set_microbatch(replace(chosen, size=2 * chosen.largest))
    assert peak_of_a_step(engine, MANY) > 1.05 * usable


def test_tensor_step_stays_within_requested_memory(limit: Limit) -> None:
    usable, batch = 16 * MIB, torch.stack(samples(*[64] * 64))
    engine = limit(engine_of(make(width=64)), usable)
    chosen = engine.tune(batch)
    assert (chosen.unit, engine.token_budget) == ("samples", None)
    engine.set_microbatch(replace(chosen, size=chosen.largest))
    assert 0.8 * usable <= peak_of_a_step(engine, batch) <= 1.005 * usable


def test_copies_of_weights_are_kept_only_where_they_fit(limit: Limit) -> None:
    def narrow_loss_fn(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_fn(model, tokens)

    def tuned(batch: list[Tensor], usable: int) -> tuple[Engine, MicrobatchChoice]:
        engine = engine_of(make(width=64), narrow_loss_fn, noise=False, fuse_gradients=True, **LISTED)
        limit(engine, 16 * MIB).step(batch)  # shows the dtype of the copies
        assert engine.fused.expected_copies_bytes > 0
        return engine, limit(engine, usable).tune(batch)

    engine, chosen = tuned(MANY, 16 * MIB)
    assert engine.fused.copies.obstacle is None
    engine.set_microbatch(replace(chosen, size=chosen.largest))
    assert peak_of_a_step(engine, MANY) <= 1.005 * 16 * MIB
    copies, short = engine.fused.copies.num_bytes, samples(*[4] * 8)
    static = 4 * sum(parameter.nbytes for parameter in engine.model.parameters())
    tight, _ = tuned(short, static + 3 * copies)
    assert tight.fused.copies.obstacle == "micro-batches need the memory"
    tight.step(short)
    assert tight.fused.copies.num_bytes == 0 < copies


@pytest.mark.parametrize("is_measured", [False, True])
def test_waiting_for_sums_in_host_memory_counts(
    is_measured: bool, limit: Limit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second for the sums of every micro-batch: as few as fit are the fastest, however fast they are computed."""
    engine = engine_of(make(width=64), offload="gradients", **BY_LENGTH)
    sum_bytes = sum(parameter.nbytes for parameter in engine.model.parameters())
    monkeypatch.setattr(tuning, "measure_link_rate", lambda _: float(sum_bytes) if is_measured else None)
    chosen = limit(engine, 512 * MIB).tune(MANY)
    seconds = chosen.timing.of(chosen.size)
    if not is_measured:
        assert seconds < 0.5
        return
    num_microbatches = len(engine.groups([len(tokens) for tokens in MANY]))
    assert num_microbatches == 1
    assert 1 < seconds < 1.5
    assert chosen.per_s == pytest.approx(sum(map(len, MANY)) / seconds, rel=0.01)


def test_slowest_link_of_all_ranks_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_ranks(*others: float | None, sums: object = "on the host") -> Any:
        ranks = SimpleNamespace(all_gather=lambda own: [own, *others])
        update = SimpleNamespace(offload=SimpleNamespace(sums=sums))
        return SimpleNamespace(device=CPU, update=update, sync=SimpleNamespace(ranks=ranks))

    monkeypatch.setattr(tuning, "measure_link_rate", lambda _: 7.0)
    assert tuning._rate_for_sums(of_ranks(9.0, None, 5.0)) == 5.0
    assert tuning._rate_for_sums(of_ranks(9.0)) == 7.0
    assert tuning._rate_for_sums(of_ranks(5.0, sums=None)) is None


def test_padded_tensor_with_lengths_stays_within_requested_memory(limit: Limit) -> None:
    """Its rows are as wide as it is, however short the samples in them are."""
    usable, batch = 16 * MIB, collate(MANY)
    lengths = {"lengths": lambda tokens: (tokens != 0).sum(1)}
    engine = limit(engine_of(make(width=64), **lengths), usable)
    chosen = engine.tune(batch)
    engine.set_microbatch(replace(chosen, size=chosen.largest))
    assert peak_of_a_step(engine, batch) <= 1.005 * usable


def test_first_window_with_large_buffers_stays_within_memory(limit: Limit) -> None:
    usable = 24 * MIB
    model = make(width=64)
    model.register_buffer("mask", torch.ones(MIB))
    engine = limit(engine_of(model, **BY_LENGTH), usable)
    chosen = engine.tune(MANY)
    engine.set_microbatch(replace(chosen, size=chosen.largest))
    assert peak_of_a_step(engine, MANY) <= 1.005 * usable


def selecting(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
    """Its shapes depend on the data: nothing can be predicted."""
    wanted = tokens > 0
    logits = model(tokens)[wanted]
    return F.cross_entropy(logits, tokens[wanted], reduction="sum"), len(logits)


def test_missing_prediction_reports_its_reason() -> None:
    engine = engine_of(make(), selecting, **BY_LENGTH)
    assert engine.tune(samples(8, 9, 10)).prediction_failure == (
        "the step cannot run without data (aten.nonzero.default)"
    )


@pytest.mark.parametrize("memory", [None, "50%", "4GiB", 2**32])
def test_limit_is_requested_or_free_memory(memory: Any) -> None:
    chosen = engine_of(make(), memory=memory, **BY_LENGTH).tune(samples(8, 9, 10))
    total = resolve_memory_budget("100%", CPU, ()).limit_bytes
    expected = {None: chosen.limit_bytes, "50%": total // 2, "4GiB": 2**32, 2**32: 2**32}[memory]
    assert chosen.limit_bytes == expected <= total
    assert chosen.peak_bytes < chosen.limit_bytes


# nothing else is different ------------------------------------------------------------------------------------------


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    numbers = np.random.get_state()
    return {
        "parameters": {name: (p, p.detach().clone()) for name, p in model.named_parameters()},
        "gradients": [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "buffers": {name: (b, b.clone()) for name, b in model.named_buffers()},
        "state": [(value, value.clone()) for value in state_of(optimizer)],
        "groups": copy.deepcopy([{**group, "params": len(group["params"])} for group in optimizer.param_groups]),
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": (numbers[0], numbers[1].tolist(), *numbers[2:]),
    }


def assert_same(before: Any, after: Any, path: str = "") -> None:
    assert type(before) is type(after), path
    if isinstance(before, tuple) and len(before) == 2 and isinstance(before[0], Tensor):
        assert before[0] is after[0], f"{path} is another tensor"
        assert torch.equal(before[1], after[1]), f"{path} changed"
    elif isinstance(before, dict):
        assert list(before) == list(after), path
        for name in before:
            assert_same(before[name], after[name], f"{path}.{name}")
    elif isinstance(before, list | tuple):
        assert len(before) == len(after), path
        for i, pair in enumerate(zip(before, after, strict=True)):
            assert_same(*pair, f"{path}[{i}]")
    else:
        assert before == after, path


def drawing(model: nn.Module, tokens: Tensor) -> Any:
    """Draws from every generator, and changes the mode of the model on the way."""
    random.random()
    np.random.random()
    torch.rand(3)
    model.head.eval()
    return loss_fn(model, tokens)


def trained(model: nn.Module, loss: Any = drawing, **settings: Any) -> Engine:
    """An engine whose optimizer has state, whose parameters have gradients, and whose modules differ in their mode."""
    engine = engine_of(model, loss, **{**BY_LENGTH, **settings})
    loss_fn(model, collate(samples(5, 6)))[0].backward()
    engine.accumulator.optimizer.step()
    for i, parameter in enumerate(model.parameters()):
        if i % 3 == 0:
            parameter.grad = None
    model.mlp[0].eval()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    return engine


@pytest.mark.parametrize("loss", [drawing, lambda model, tokens: (drawing(model, tokens), selecting(model, tokens))[1]])
def test_tuning_leaves_state_unchanged(loss: Any) -> None:
    model = make(dropout=0.3, norm=True)
    engine = trained(model, loss)
    before = snapshot(model, engine.accumulator.optimizer)
    engine.tune(samples(*range(8, 24)))
    assert_same(before, snapshot(model, engine.accumulator.optimizer))
    assert any(gradient is not None for gradient, _ in before["gradients"])


ERRORS = [ValueError("mine"), RuntimeError("mine"), KeyError("mine"), KeyboardInterrupt("mine"), SystemExit("mine")]


@pytest.mark.parametrize("when", [1, slow(2), slow(3), 5])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_loss_error_passes_through_and_changes_nothing(error: BaseException, when: int) -> None:
    """An error where there is no data is one of the prediction, and the same comes again where there is."""
    calls: list[type] = []

    def failing(model: nn.Module, tokens: Tensor) -> Any:
        drawing(model, tokens)
        calls.append(type(tokens))
        if len(calls) >= when:
            raise error
        return loss_fn(model, tokens)

    model = make(dropout=0.3, norm=True)
    engine = trained(model, failing)
    before, attend = snapshot(model, engine.accumulator.optimizer), F.scaled_dot_product_attention
    with pytest.raises(type(error)) as raised:
        engine.tune(samples(*range(8, 24)))
    assert raised.value is error
    assert error.__context__ is None
    assert_same(before, snapshot(model, engine.accumulator.optimizer))
    assert engine.choice is None
    assert _get_current_dispatch_mode() is None
    assert F.scaled_dot_product_attention is attend
    assert len(calls) == when or (issubclass(type(error), Exception) and calls[-1] is Tensor)
    error.__traceback__ = None


def test_user_error_comes_from_run_with_data() -> None:
    def failing(model: nn.Module, tokens: Tensor) -> Any:
        raise ValueError(f"no {type(tokens).__name__} is good enough")

    engine = engine_of(make(), failing, **BY_LENGTH)
    with pytest.raises(ValueError, match=r"^no Tensor is good enough$"):
        engine.step(samples(8, 9))


@pytest.mark.parametrize(
    ("loss", "kind", "message"),
    [
        (lambda m, x: loss_fn(m, x)[0], TypeError, r"is a tensor of shape \(\): return the pair \(loss_sum, items\)"),
        (lambda m, x: (m(x), 3), ValueError, r"it must be the 0-d sum of the item losses"),
        (lambda m, x: (m(x).sum(), -1), ValueError, "are -1: they must be a finite count, 0 or more"),
        (lambda m, x: (m(x).sum().detach(), 3), ValueError, "does not depend on any parameter"),
        (lambda m, x: {}, ValueError, "the loss has no term: return at least one"),
        (lambda m, x: {"a": loss_fn(m, x), "b": loss_fn(m, x)}, ValueError, "Pass count_items="),
    ],
)
def test_loss_with_wrong_result_is_rejected(loss: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        engine_of(make(), loss, **BY_LENGTH).step(samples(8, 9))


def test_gradients_of_open_window_are_kept() -> None:
    batch = samples(8, 9, 10)
    found = []
    for tunes in (False, True):
        model = make()
        engine = engine_of(model, **BY_LENGTH)
        window = engine.accumulator.window()
        window.backward(loss_fn(model, collate(batch))[0], items=27)
        if tunes:
            engine.tune(batch)
        window.backward(loss_fn(model, collate(batch))[0], items=27)
        window.step()
        found.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *found))


# the update is the same ---------------------------------------------------------------------------------------------


def updated(engine: Engine, batch: Any, before: Callable[[Engine], object]) -> list[Tensor]:
    torch.manual_seed(3)
    before(engine)
    for _ in range(2):
        engine.step(batch)
    optimizer = engine.accumulator.optimizer
    return [*engine.model.parameters(), *engine.model.buffers(), *state_of(optimizer)]


@pytest.mark.parametrize(
    "kind", [{}, slow({"dropout": 0.3}), slow({"norm": True})], ids=["plain", "dropout", "batch norm"]
)
@pytest.mark.parametrize("settings", [LISTED, BY_LENGTH], ids=["samples", "tokens"])
def test_tuned_updates_equal_those_with_given_choice(settings: dict[str, Any], kind: dict[str, Any]) -> None:
    batch = samples(*range(8, 40))
    engine = engine_of(make(**kind), **settings)
    found = updated(engine, batch, lambda engine: engine.tune(batch))
    chosen = engine.choice
    assert chosen is not None
    expected = updated(engine_of(make(**kind), **settings), batch, lambda engine: engine.set_microbatch(chosen))
    assert all(map(torch.equal, found, expected))
    if settings is LISTED:
        fixed = engine_of(make(**kind), microbatch=chosen.size, **settings)
        assert all(map(torch.equal, found, updated(fixed, batch, lambda engine: None)))


def test_tuned_updates_equal_those_with_same_budget() -> None:
    batch = samples(*range(8, 40))
    engine = engine_of(make(dropout=0.3), **BY_LENGTH)
    found = updated(engine, batch, lambda engine: engine.tune(batch))
    fixed = engine_of(make(dropout=0.3), microbatch=TokenBudget(40), **BY_LENGTH)
    fixed.microbatch_size = copy.copy(engine.microbatch_size)
    fixed.microbatch_size.requested = TokenBudget(max(engine.microbatch_size.limit, 39))
    assert fixed.groups(lengths_of(batch)) == engine.groups(lengths_of(batch))
    assert all(map(torch.equal, found, updated(fixed, batch, lambda engine: None)))


def test_only_the_first_step_tunes() -> None:
    batch = samples(*range(8, 24))
    engine = engine_of(make(), **BY_LENGTH)
    assert (engine.choice, engine.token_budget) == (None, None)
    report = engine.step(batch)
    chosen = engine.choice
    assert chosen is not None
    assert (report.step, report.items, report.tokens, report.retries) == (1, sum(range(8, 24)), sum(range(8, 24)), 0)
    assert engine.token_budget == chosen.size
    engine.step(samples(50))
    assert engine.choice is chosen


def test_retuning_replaces_choice() -> None:
    engine = engine_of(make(), **BY_LENGTH)
    first = engine.tune(samples(8, 8))
    second = engine.tune(samples(*[30] * 8))
    assert engine.choice is second
    assert (first.longest, second.longest) == (8, 30)
    assert engine.token_budget == second.size


def test_choice_can_be_used_by_another_engine() -> None:
    batch = samples(*range(8, 24))
    chosen = engine_of(make(), **BY_LENGTH).tune(batch)
    engine = engine_of(make(), **BY_LENGTH)
    engine.set_microbatch(chosen)
    assert engine.choice == chosen
    assert engine.step(batch).num_microbatches == len(engine.groups(lengths_of(batch)))


# all kinds of training ----------------------------------------------------------------------------------------------


def test_later_windows_may_have_longer_samples() -> None:
    engine = engine_of(make(), **BY_LENGTH)
    chosen = engine.tune(samples(*[8] * 6))
    assert chosen.size <= 48
    report = engine.step(samples(200, 8, 49, 8))
    assert (report.items, report.retries) == (265, 0)
    assert engine.groups([200, 8, 49, 8])[0] == (0,)
    assert engine.choice is chosen


def test_model_in_evaluation_mode_stays_in_it() -> None:
    model = make(dropout=0.5, norm=True).eval()
    engine = engine_of(model, **BY_LENGTH)
    before = snapshot(model, engine.accumulator.optimizer)["buffers"]
    chosen = engine.tune(samples(8, 9, 10))
    assert chosen.prediction_failure is None
    assert not any(module.training for module in model.modules())
    assert_same(before, snapshot(model, engine.accumulator.optimizer)["buffers"])


def test_frozen_parameters_use_neither_gradients_nor_state() -> None:
    class Adapted(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = linear.requires_grad_(requires_grad=False)
            self.down, self.up = nn.Linear(linear.in_features, 2), nn.Linear(2, linear.out_features)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.linear(inputs) + self.up(self.down(inputs))

    def adapted(width: int) -> Decoder:
        model = make(width=width).requires_grad_(requires_grad=False)
        model.mix = nn.ModuleList(map(Adapted, model.mix))
        return model

    model = adapted(64)
    batch = samples(*[40] * 8)
    engine = engine_of(model, **BY_LENGTH)
    chosen = engine.tune(batch)
    assert chosen.prediction_failure is None
    one = samples(40)  # of which there is but one micro-batch, whatever the clock says
    peaks = [engine_of(kind, **BY_LENGTH).tune(one).peak_bytes for kind in (adapted(64), make(width=64))]
    assert peaks[0] < peaks[1]
    engine.step(batch)
    assert peak_of_a_step(engine, batch) <= 1.01 * chosen.peak_bytes
    assert all(p.grad is None for p in model.parameters())


def two_terms(model: nn.Module, tokens: Tensor) -> dict[str, Any]:
    logits = model(tokens)
    labels = tokens.masked_fill(tokens == 0, IGNORED)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return {"class": (loss, (tokens != 0).sum()), "size": (logits[tokens.sum(1) >= 0].square().sum(), len(tokens))}


def count_two(batch: list[Tensor]) -> dict[str, Any]:
    return {"class": sum(map(len, batch)), "size": len(batch)}


def test_multi_term_losses_are_tuned() -> None:
    def both(model: nn.Module, tokens: Tensor) -> dict[str, Any]:
        logits = model(tokens)
        return {"class": loss_fn(model, tokens), "size": (logits.square().sum(), len(tokens))}

    batch = samples(*range(8, 24))
    for loss in (both, two_terms):
        engine = engine_of(make(), loss, count_items=count_two, **BY_LENGTH)
        report = engine.step(batch)
        assert engine.choice is not None
        assert (engine.choice.prediction_failure is None) is (loss is both)
        assert {name: term.items for name, term in report.terms.items()} == count_two(batch)


def test_microbatches_without_items_need_no_graph() -> None:
    """As in a window, where their loss is not looked at."""

    def sparing(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        wanted = tokens[:, 0] > VOCABULARY  # that of no sample
        return torch.zeros(()), int(wanted.sum())

    engine = engine_of(make(), sparing, **BY_LENGTH)
    report = engine.step(samples(8, 9, 10))
    assert (report.skipped, report.items) == ("no items", 0)


def test_gradient_scaler_is_unchanged() -> None:
    def autocast(model: nn.Module, tokens: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_fn(model, tokens)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    engine = engine_of(make(), autocast, scaler=scaler, **BY_LENGTH)
    before = scaler.state_dict()
    chosen = engine.tune(samples(8, 9, 10))
    assert chosen.prediction_failure is None
    assert scaler.state_dict() == before
    assert engine.step(samples(8, 9, 10)).skipped is None


def test_bfloat16_weights_are_tuned_and_unchanged() -> None:
    model = make().bfloat16()
    engine = engine_of(model, **BY_LENGTH)
    before = snapshot(model, engine.accumulator.optimizer)["parameters"]
    chosen = engine.tune(samples(8, 9, 10))
    assert chosen.prediction_failure is None
    assert_same(before, snapshot(model, engine.accumulator.optimizer)["parameters"])
    assert engine.step(samples(8, 9, 10)).skipped is None


def test_lazy_modules_are_initialized() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 1))
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, x: (m(x).square().sum(), len(x)))
    report = engine.step(torch.ones(8, 3))
    assert engine.choice is not None
    assert "cannot be copied" in str(engine.choice.prediction_failure)
    assert report.items == 8


# what does not go ---------------------------------------------------------------------------------------------------


def test_oversized_sample_is_named_and_nothing_chosen(limit: Limit) -> None:
    model = make(width=64)
    engine = limit(engine_of(model, **BY_LENGTH), 8 * MIB)
    long, *short = samples(2000, 8, 9)
    predicted = PeakPredictor.from_training(model, engine.accumulator.optimizer, loss_fn).predict(long[None])
    with pytest.raises(MemoryLimitError) as raised:
        engine.step([short[0], long, short[1]])
    assert str(raised.value) == (
        f"a sample of 2,000 tokens needs {describe_bytes(predicted.peak_bytes)} ({describe_parts(predicted)}), but "
        f"memory is limited to {engine.memory}B, of which 8.0 MiB are usable for tensors. Shorten it, use activation "
        "checkpointing, a narrower dtype or fewer trained parameters, or raise the memory limit."
    )
    assert engine.choice is None
    assert engine.step(short).step == 1, "the shorter ones fit"


def test_empty_batch_cannot_be_tuned() -> None:
    for batch in ([], ()):
        with pytest.raises(ValueError, match="empty") as raised:
            engine_of(make(), **BY_LENGTH).tune(batch)
        assert str(raised.value) == "the batch is empty: auto-tuning runs some of its samples."


@pytest.mark.parametrize(("found", "samples_of_it"), [(2, 3), (4, 3), (0, 3)])
def test_lengths_are_one_per_sample(found: int, samples_of_it: int) -> None:
    engine = engine_of(make(), collate=collate, lengths=lambda batch: [8] * found)
    with pytest.raises(ValueError, match="lengths") as raised:
        engine.tune(samples(*[8] * samples_of_it))
    assert str(raised.value) == (
        f"lengths= returned {found} lengths for a batch of {samples_of_it} samples: it must return one for each, in "
        "their order."
    )


@pytest.mark.parametrize("where", [0, 1, 2])
def test_sample_without_tokens_is_named(where: int) -> None:
    lengths = [8, 9, 10]
    lengths[where] = 0
    engine = engine_of(make(), collate=collate, lengths=lambda batch: lengths)
    with pytest.raises(ValueError, match="lengths") as raised:
        engine.tune(samples(8, 9, 10))
    assert str(raised.value) == (
        f"lengths[{where}] is 0: a sample has at least 1 token. Remove samples without tokens."
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"microbatch": 4, "memory": "2GiB"},
            "memory='2GiB' chooses the micro-batch, and microbatch=4 is fixed: pass microbatch=\"auto\", or "
            "leave memory= out.",
        ),
        (
            {"microbatch": TokenBudget(64), "memory": 2**31, **BY_LENGTH},
            "memory=2147483648 chooses the micro-batch, and microbatch=TokenBudget(tokens=64) is fixed: pass "
            'microbatch="auto", or leave memory= out.',
        ),
        ({"microbatch": "fast"}, "microbatch is 'fast': it must be \"auto\", an int, or a TokenBudget."),
        ({"microbatch": ""}, "microbatch is '': it must be \"auto\", an int, or a TokenBudget."),
    ],
)
def test_incompatible_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="microbatch") as raised:
        engine_of(make(), **settings)
    assert str(raised.value) == message


def test_memory_above_device_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"^memory 1000TiB is more than the .*GiB that the device has: pass "):
        engine_of(make(), memory="1000TiB", **BY_LENGTH).tune(samples(8, 9))


CHOICE = MicrobatchChoice(16, 9, "tokens", 1, 2, 1.0, 16, (), choice.TimeModel(((8, 1.0), (16, 1.5))))


@pytest.mark.parametrize("microbatch", [4, TokenBudget(64)])
def test_engine_with_fixed_microbatch_rejects_tuning_and_choice(microbatch: Any) -> None:
    engine = engine_of(make(), microbatch=microbatch, **BY_LENGTH)
    with pytest.raises(ValueError, match="is fixed") as raised:
        engine.tune(samples(8, 9))
    assert str(raised.value) == f'microbatch={microbatch!r} is fixed: pass microbatch="auto" to have it chosen.'
    with pytest.raises(ValueError, match="is fixed") as raised:
        engine.set_microbatch(CHOICE)
    assert str(raised.value) == f'microbatch={microbatch!r} is fixed: pass microbatch="auto" to use a choice.'
    assert engine.step(samples(8, 9)).num_microbatches == 1


def test_token_choice_is_not_valid_for_samples() -> None:
    with pytest.raises(ValueError, match="choice") as raised:
        engine_of(make(), **LISTED).set_microbatch(CHOICE)
    assert str(raised.value) == (
        "the choice is in tokens, and this engine counts samples: pass lengths=, or tune again."
    )
    with pytest.raises(ValueError, match="choice") as raised:
        engine_of(make(), **BY_LENGTH).set_microbatch(replace(CHOICE, unit="samples"))
    assert str(raised.value) == (
        "the choice is in samples, and this engine counts tokens: leave lengths= out, or tune again."
    )


@pytest.mark.parametrize("settings", [{}, LISTED, BY_LENGTH])
def test_groups_are_unknown_before_tuning(settings: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="chosen") as raised:
        engine_of(make(), **settings).groups([8, 9])
    assert str(raised.value) == ("no micro-batch is chosen yet: call tune(batch) first, or step(batch), which does it.")


def test_tuned_engine_can_be_copied() -> None:
    batch = samples(*range(8, 24))
    engine = engine_of(make(), **BY_LENGTH)
    engine.tune(batch)
    other = copy.deepcopy(engine)
    assert other.choice == engine.choice
    assert other.step(batch).loss == engine.step(batch).loss
    assert bigbatch.verify(engine.model, loss_fn, batch, collate=collate).exact
