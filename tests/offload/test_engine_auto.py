"""``Engine(offload="auto")``: the level of the first batch, the same bits as at "none", and the state of such a run.

The models are on the CPU, and described to the choice as on a card with some memory; nothing else is replaced.
"""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigbatch
from bigbatch.autotune.problem import TuningProblem
from bigbatch.batching.split import split
from bigbatch.engine import card_target
from bigbatch.engine.card_target import CardTarget
from bigbatch.engine.level_cases import level_cases
from bigbatch.engine.level_prediction import LevelPrediction
from bigbatch.errors import InputError, MemoryLimitError, WindowStateError
from bigbatch.memory.usage import MemoryBudget
from bigbatch.offload import costs, streamed_optimizer, sum_streamer
from bigbatch.offload.cards import card
from bigbatch.offload.level_choice import LevelLimits, choose_level
from bigbatch.offload.levels import LEVELS, Offload
from offload import auto_runs
from offload.models import (
    CHUNK_BYTES,
    OPTIMIZERS,
    decoder_loss,
    make,
    make_batch,
    make_engine,
    make_model,
    make_tokens,
    states,
    train,
    weights,
)
from support.process_pool import Pools
from support.tiers import slow

CUDA, MIB = torch.device("cuda"), 2**20
SetCard = Callable[..., None]


@pytest.fixture
def set_card(monkeypatch: pytest.MonkeyPatch) -> SetCard:
    """Return a function that describes the device of every model as a card with so many bytes."""
    monkeypatch.setattr(costs, "CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(costs, "SUM_SLOT_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(card_target, "is_card", lambda device: True)

    def set_bytes(card_bytes: int = 2**50, host_bytes: int = 2**50) -> None:
        target = CardTarget(CUDA, card("h200"), LevelLimits(card_bytes, host_bytes))
        monkeypatch.setattr(card_target, "describe_card", lambda *_: target)

    set_bytes()
    return set_bytes


def needs_of(**settings: Any) -> dict[Offload, int]:
    """Return what each level needs on the card; its memory is not limited."""
    engine = make("auto", **settings)
    train(engine, 0, 1)
    choice = engine.offload_choice
    assert choice is not None
    return {case.level: case.card_bytes for case in choice.cases}


def everything(engine: bigbatch.Engine) -> tuple[Any, Any]:
    return weights(engine), states(engine)


# the choice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_lowest_level_that_fits_has_bits_of_none(set_card: SetCard, level: Offload) -> None:
    wide = {"model": None, "max_grad_norm": 0.1}
    needs = needs_of()
    assert list(needs) == list(LEVELS)
    assert sorted(needs.values(), reverse=True) == list(needs.values())
    set_card(needs[level])
    engine = make("auto", **wide)
    assert engine.offload == "auto"
    assert engine.offload_choice is None
    train(engine, 0, 4)
    assert engine.offload == level
    assert str(engine.offload_choice).startswith(f"offload {level}: ")
    offload = engine.accumulator.update.offload
    assert ("none" if offload is None else offload.level) == level
    expected = make("none", **wide)
    train(expected, 0, 4)
    assert everything(engine) == everything(expected)


def test_host_limits_the_level(set_card: SetCard) -> None:
    needs = needs_of()
    set_card(needs["master"], host_bytes=2**10)
    engine = make("auto")
    with pytest.raises(
        MemoryLimitError, match=r"^offload=\"auto\": no level fits: none needs .* on the card; optimizer"
    ):
        train(engine, 0, 1)
    set_card(needs["none"], host_bytes=0)
    train(engine, 0, 1)
    assert engine.offload == "none"


def test_no_level_that_fits_is_refused_and_changes_nothing(set_card: SetCard) -> None:
    engine = make("auto")
    before = weights(engine)
    set_card(1000)
    with pytest.raises(MemoryLimitError, match=r"gradients needs .* MiB on the card and .* are usable\. Shorten"):
        train(engine, 0, 1)
    assert weights(engine) == before
    assert not engine.accumulator.optimizer.state
    assert engine.offload == "auto"
    set_card()
    train(engine, 0, 1)
    assert engine.offload == "none"


def test_microbatch_and_level_are_both_chosen(set_card: SetCard) -> None:
    """In memory for a part of the batch at every level: whichever is faster, it trains."""
    needs, tokens = {}, make_tokens(0, 512)
    for offload in ("auto", "none"):
        engine = make(offload, microbatch=64)
        engine.step(tokens)
        needs[offload] = 0 if engine.offload_choice is None else engine.offload_choice.cases[0].card_bytes
    set_card(needs["auto"])
    chosen = make("auto", microbatch="auto", memory="4GiB")
    chosen.step(tokens)
    choice = chosen.offload_choice
    assert choice is not None
    assert [case.level for case in choice.cases] == list(LEVELS)
    assert all(case.card_bytes <= needs["auto"] and case.window_s is not None for case in choice.cases)
    assert chosen.offload == choice.level
    assert chosen.choice is not None
    found, expected = (torch.cat([torch.tensor(w).flatten() for w in weights(e).values()]) for e in (chosen, engine))
    assert torch.allclose(found, expected, atol=1e-4)


def test_tune_chooses_level_first(set_card: SetCard) -> None:
    set_card(needs_of(microbatch=8)["optimizer"])
    engine = make("auto", microbatch="auto", memory="4GiB")
    engine.tune(make_tokens(0))
    assert engine.offload != "auto"


def test_memory_is_for_the_level_with_a_fixed_microbatch(set_card: SetCard, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    target = card_target.describe_card(CUDA, None, [])
    monkeypatch.setattr(card_target, "describe_card", lambda _, memory, __: asked.append(memory) or target)
    train(make("auto", memory="3GiB"), 0, 1)
    assert asked == ["3GiB"]
    with pytest.raises(ValueError, match=r"^memory='3GiB' chooses the micro-batch, and microbatch=4 is fixed"):
        make("optimizer", memory="3GiB")


def test_token_budget_is_a_fixed_microbatch(set_card: SetCard) -> None:
    def loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        return decoder_loss(model, tokens)

    settings = {"microbatch": bigbatch.TokenBudget(24), "lengths": lambda batch: [6] * len(batch), "loss_fn": loss}
    engine = make("auto", **settings)
    train(engine, 0, 1)
    choice = engine.offload_choice
    assert choice is not None
    assert {case.level: case.card_bytes for case in choice.cases} == needs_of(microbatch=4)


def test_model_on_cpu_is_at_none() -> None:
    engine = make("auto")
    assert engine.offload == "none"
    assert str(engine.offload_choice) == "offload none: the model is on cpu, whose memory is that of the host"
    train(engine, 0, 2)
    expected = make("none")
    train(expected, 0, 2)
    assert everything(engine) == everything(expected)


def test_level_that_is_passed_has_no_choice() -> None:
    engine = make("optimizer")
    assert engine.offload == "optimizer"
    assert engine.offload_choice is None
    with pytest.raises(AttributeError):
        engine.offload = "none"  # type: ignore[misc]


# levels that are left out ------------------------------------------------------------------------------------------


def by_norm_of_all(parameters: list[Tensor]) -> torch.optim.Optimizer:
    class NormOfAll(torch.optim.Optimizer):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            with torch.no_grad():
                own = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
                norm = torch.stack([p.grad.norm() for p in own]).norm()
                for p in own:
                    p.sub_(p.grad / norm, alpha=0.1)

    return NormOfAll(parameters, {})


def test_optimizer_without_levels_is_at_none(set_card: SetCard) -> None:
    set_card(0)  # no memory is predicted
    model = make_model()
    engine = make_engine(model, by_norm_of_all(list(model.parameters())), "auto")
    engine.step(make_batch(0))
    choice = engine.offload_choice
    assert choice is not None
    assert str(choice) == "offload none: no other level is supported"
    assert list(choice.unsupported) == ["optimizer", "master", "gradients"]
    assert choice.unsupported["optimizer"].startswith("offload= steps an optimizer one part of its parameters after")


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"gradient_hook": lambda parameters: None}, ["none", "optimizer"]),
        ({"reproducible": True, "quantum": 2}, ["none", "optimizer"]),
        ({"fuse_gradients": True}, ["none", "optimizer", "master"]),
        ({"fuse_gradients": "auto"}, list(LEVELS)),
    ],
    ids=["gradient_hook", "reproducible", "fuse_gradients", "fuse_gradients auto"],
)
def test_settings_leave_levels_out(set_card: SetCard, settings: dict[str, Any], left: list[str]) -> None:
    assert list(needs_of(**settings)) == left
    set_card(needs_of(**settings)[left[-1]])  # type: ignore[index]
    engine = make("auto", **settings)
    train(engine, 0, 2)
    assert engine.offload == left[-1]
    if left[-1] == "gradients":
        assert engine.fused.obstacle == 'offload="gradients" sums gradients in host memory'


def test_loss_without_autocast_leaves_master_out(set_card: SetCard) -> None:
    model = make_model()
    engine = make_engine(model, OPTIMIZERS["adamw"](list(model.parameters())), "auto")
    engine.step(make_batch(0))
    choice = engine.offload_choice
    assert choice is not None
    assert [case.level for case in choice.cases] == ["none", "optimizer", "gradients"]
    assert choice.unsupported == {"master": "the loss reads no weight in a linear layer under autocast to bfloat16"}


def test_sparse_layer_leaves_gradients_out(set_card: SetCard) -> None:
    model = nn.Sequential(nn.Embedding(30, 16, sparse=True), nn.Linear(16, 3))

    def loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        return model(tokens).float().square().sum(), tokens.numel()

    engine = make_engine(model, torch.optim.SGD(model.parameters(), lr=0.1), "auto", loss_fn=loss, max_grad_norm=None)
    engine.step(make_tokens(0))
    choice = engine.offload_choice
    assert choice is not None
    assert "gradients" in choice.unsupported


def test_coupled_loss_has_levels_of_the_state(set_card: SetCard) -> None:
    coupled = bigbatch.Coupled(lambda model, batch: model(batch[0]), lambda _, features: features.square().mean())
    model = make_model()
    engine = make_engine(model, OPTIMIZERS["adamw"](list(model.parameters())), "auto", loss_fn=coupled)
    engine.step(make_batch(0))
    choice = engine.offload_choice
    assert choice is not None
    assert [case.level for case in choice.cases] == ["none", "optimizer", "gradients"]


def test_gradient_for_other_code_is_at_optimizer_at_most(set_card: SetCard) -> None:
    set_card(needs_of()["optimizer"])
    engine = make("auto")
    engine.backward(make_tokens(0))
    choice = engine.offload_choice
    assert choice is not None
    assert [case.level for case in choice.cases] == ["none", "optimizer"]
    assert engine.offload == "optimizer"
    assert all(p.grad is not None for p in engine.model.parameters())


# refusals ----------------------------------------------------------------------------------------------------------


def test_accumulator_is_refused() -> None:
    model = make_model()
    with pytest.raises(
        InputError, match=r'^offload="auto" is chosen for a batch and its loss, and an Accumulator sees'
    ):
        bigbatch.Accumulator(model, torch.optim.AdamW(model.parameters()), offload="auto")  # type: ignore[arg-type]


def test_exact_batch_norm_is_refused(set_card: SetCard) -> None:
    with pytest.raises(InputError) as caught:
        make("auto", batch_norm="exact", model=nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    assert str(caught.value) == (
        'offload="auto" predicts the memory of one micro-batch, and with batch_norm="exact" it depends on the whole '
        'batch: pass a level, such as offload="optimizer".'
    )


def test_loss_that_cannot_be_predicted_is_refused(set_card: SetCard) -> None:
    def loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        return model(tokens[tokens > 3][None]).sum(), 1

    engine = make("auto", loss_fn=loss)
    with pytest.raises(InputError, match=r'^offload="auto" predicts the memory of every level, and that is not possib'):
        train(engine, 0, 1)


def test_optimizer_that_cannot_be_predicted_is_refused(set_card: SetCard) -> None:
    """NAdam divides by a value of its state."""
    engine = make("auto", "nadam")
    with pytest.raises(InputError, match=r"cannot run without data \(float division by zero\)\. Pass a level, such as"):
        train(engine, 0, 1)
    expected = weights(make("none", "nadam"))
    assert weights(engine) == expected


def test_empty_batch_is_refused_until_a_level_is_known(set_card: SetCard) -> None:
    engine = make("auto")
    with pytest.raises(ValueError, match=r'^the batch is empty: offload="auto" predicts the memory of some of its sa'):
        engine.step(make_tokens(0)[:0])
    train(engine, 0, 1)
    assert engine.step(make_tokens(0)[:0]).skipped == "no items"


def test_own_windows_before_the_choice_are_refused(set_card: SetCard) -> None:
    engine = make("auto")
    engine.accumulator.prepare()
    assert not engine.accumulator.optimizer.state
    with pytest.raises(WindowStateError) as caught:
        engine.accumulator.window()
    assert str(caught.value) == (
        'the engine has offload="auto", which its first step(batch) chooses: call it, or tune(batch) with '
        'microbatch="auto", before windows of your own; or pass a level.'
    )
    with pytest.raises(WindowStateError):
        next(engine.accumulator.windows([make_tokens(0)], num_microbatches=1))
    train(engine, 0, 1)
    engine.accumulator.window().abort()


# state -------------------------------------------------------------------------------------------------------------


def test_calls_before_the_choice_work(set_card: SetCard) -> None:
    engine = make("auto")
    state = engine.state_dict()
    assert "offload" not in state["engine"]
    assert state["optimizer"]["state"] == {}
    with engine.whole_weights():
        assert engine.model.first.weight.dtype is torch.float32
    engine.load_state_dict(copy.deepcopy(state))
    copied = copy.deepcopy(engine)
    for each in (engine, copied):
        train(each, 0, 2)
    assert everything(copied) == everything(engine)


@pytest.mark.parametrize(
    ("name", "after"),
    [
        *(("adamw", level) for level in LEVELS),
        *(slow(name, "none") for name in ("adamw-fused", "adagrad", "asgd", "muon")),
    ],
)
def test_resumed_run_has_equal_bits(set_card: SetCard, name: str, after: Offload) -> None:
    """In less memory than before."""
    settings = {"name": name}
    needs = needs_of(**settings)
    expected = make("none", **settings)
    train(expected, 0, 4)
    set_card(needs["none"])
    first = make("auto", **settings)
    train(first, 0, 2)
    set_card(needs[after])
    second = make("auto", seed=1, **settings)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.offload == "auto"
    train(second, 2, 4)
    assert second.offload == after
    assert everything(second) == everything(expected)


def test_loaded_state_is_in_host_memory_until_the_choice(set_card: SetCard) -> None:
    """Hooks of levels that were tried or given up are removed: state that is loaded later is on the device."""
    first = make("optimizer")
    train(first, 0, 1)
    set_card()
    second = make("auto")
    optimizer = second.accumulator.optimizer
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 1
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, 1, 2)
    gc.collect()
    assert second.offload == "none"
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 0
    assert second.accumulator.update.deferred is None


def test_states_of_other_engines_are_exchanged(set_card: SetCard) -> None:
    """With those of a level by name, and of earlier versions, which had the level that was chosen."""
    named, auto = make("optimizer"), make("auto")
    train(named, 0, 2)
    auto.load_state_dict(copy.deepcopy(named.state_dict()))
    train(auto, 2, 3)
    state = copy.deepcopy(auto.state_dict())
    assert "offload" not in state["engine"]
    named.load_state_dict({**state, "engine": {**state["engine"], "offload": "gradients"}})
    train(auto, 3, 4)
    train(named, 3, 4)
    assert everything(auto) == everything(named)


# ranks -------------------------------------------------------------------------------------------------------------


def test_ranks_choose_the_same_level(pools: Pools) -> None:
    """The second has less memory: what fits there is used on both."""
    needs = pools(2).run(auto_runs.needs)
    assert needs[0] == needs[1]
    for level in LEVELS:
        plenty, little = 2 * needs[0]["none"], needs[0][level]
        found = pools(2).run(auto_runs.train, [plenty, little], 3)
        assert [each["level"] for each in found] == [level, level]
        expected = pools(2).run(auto_runs.train_at, level, 3)
        assert [each["weights"] for each in found] == expected


def test_rank_without_samples_follows(pools: Pools) -> None:
    needs = pools(2).run(auto_runs.needs)[0]
    found = pools(2).run(auto_runs.train, [needs["optimizer"]] * 2, 2, True)
    assert [each["level"] for each in found] == ["optimizer", "optimizer"]


def test_wrapped_model_has_the_levels_of_its_wrapper(pools: Pools) -> None:
    wrapped, sharded = (pools(2).run(auto_runs.train_wrapped, is_sharded) for is_sharded in (False, True))
    assert wrapped == 2 * [["none", ["none", "optimizer"], ["master", "gradients"]]]
    assert sharded == 2 * [["none", [], ["optimizer", "master", "gradients"]]]


def test_ranks_fail_together(pools: Pools) -> None:
    one, other = pools(2).run(auto_runs.fail_on_one)
    assert one == "KeyError: 'no memory'"
    assert other == "RankFailedError: rank 0 failed: 'no memory'"
    refused = pools(2).run(auto_runs.train_too_large)
    assert all(each.startswith('MemoryLimitError: offload="auto": no level fits') for each in refused)
    assert refused[0] == refused[1]


def test_loss_that_calls_collectives_is_refused(pools: Pools) -> None:
    for message in pools(2).run(auto_runs.refuse_lockstep):
        assert message == (
            'offload="auto" predicts the memory by calling loss_fn on tensors without data, and with lockstep=True it '
            'calls collectives: pass a level, such as offload="optimizer".'
        )


# on a card ---------------------------------------------------------------------------------------------------------


def stack_loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
    with torch.autocast(batch.device.type, dtype=torch.bfloat16):
        return model(batch).float().square().sum(), len(batch)


def large_engine(offload: str, **settings: Any) -> bigbatch.Engine:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(24)]).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return make_engine(model, optimizer, offload, **({"loss_fn": stack_loss, "noise": False} | settings))


@pytest.fixture
def middle_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let chunks have one weight matrix each, with 32 MiB of state."""
    for module in (costs, streamed_optimizer):
        monkeypatch.setattr(module, "CHUNK_BYTES", 32 * MIB)
    for module in (costs, sum_streamer):
        monkeypatch.setattr(module, "SUM_SLOT_BYTES", 24 * MIB)


CAPPED = [(4000, "none"), (1500, "optimizer"), (1000, "master"), (840, "gradients")]
"""MiB of a card, and the level of 10⁸ weights of AdamW there: 1,536 MiB at "none", 768, 576 and 192 above it, copies in
bfloat16 of 192 up to "optimizer", and 128, 192 and 256 for the update."""


@pytest.mark.parametrize(("mib", "level"), CAPPED)
def test_level_of_capped_card_is_predicted_without_it(middle_chunks: None, mib: int, level: Offload) -> None:
    """What the test below runs."""
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False, device="meta") for _ in range(24)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    samples = split(torch.randn(64, 2048), 1, device=torch.device("cpu"))
    problem = TuningProblem(model, optimizer, stack_loss, samples, None, uniform_length=True)
    prediction = LevelPrediction(problem, CUDA, levels=LEVELS, narrow=[f"{index}.weight" for index in range(24)])
    limits = LevelLimits(MemoryBudget.from_limit(mib * MIB, None).usable_bytes, 2**50)
    cases = level_cases(prediction, CardTarget(CUDA, card("h200"), limits), 16)
    assert choose_level(cases, limits).level == level


@pytest.mark.gpu
@pytest.mark.parametrize(("mib", "level"), CAPPED)
def test_capped_memory_of_card_has_bits_of_none(middle_chunks: None, mib: int, level: Offload) -> None:
    batch = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
    found = {}
    for offload in ("none", "auto"):
        gc.collect()
        torch.cuda.empty_cache()
        base = torch.cuda.memory_allocated()
        limit = {"memory": base + mib * MIB} if offload == "auto" else {}
        engine = large_engine(offload, microbatch=16, max_grad_norm=None, **limit)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            engine.step(batch)
        if offload == "auto":
            assert engine.offload == level, str(engine.offload_choice)
            assert torch.cuda.max_memory_allocated() - base <= mib * MIB
        found[offload] = {name: tensor.cpu() for name, tensor in engine.state_dict()["model"].items()}
        del engine
    assert all(torch.equal(found["none"][name], found["auto"][name]) for name in found["none"])


@pytest.mark.gpu
def test_microbatch_and_level_are_chosen_on_card(middle_chunks: None) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    engine = large_engine("auto", microbatch="auto", memory=torch.cuda.memory_allocated() + 1400 * MIB)
    batch = torch.randn(4096, 2048)
    losses = [engine.step(batch).loss for _ in range(3)]
    assert engine.offload in ("optimizer", "master", "gradients")
    assert engine.choice is not None
    assert losses[-1] < losses[0]
