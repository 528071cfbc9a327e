"""offload="master": bfloat16 weights on the device, float32 ones in host memory, and the bits of a run without it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import bigbatch
from bigbatch.errors import InputError, MemoryLimitError, TornUpdateError, WindowStateError
from bigbatch.offload.transfers import Transfers
from offload import rank_runs
from offload.models import (
    OPTIMIZERS,
    Decoder,
    decoder_loss,
    is_in_buffers,
    make,
    make_engine,
    make_tokens,
    states,
    streamed_of,
    train,
    weights,
)
from offload.test_failures import Link, broken
from support.language_models import records, run, save_model_folder, write_jsonl
from support.process_pool import Pools
from support.tiers import slow_except

ADAMW = OPTIMIZERS["adamw"]


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Link:
    return Link(monkeypatch)


@pytest.mark.parametrize("name", slow_except(OPTIMIZERS, "adamw", "sgd", "muon"))
def test_twenty_updates_have_equal_bits(name: str):
    plain, narrow = make("none", name), make("master", name)
    expected, actual = train(plain, 0, 20), train(narrow, 0, 20)
    assert weights(narrow) == weights(plain)
    assert states(narrow) == states(plain)
    assert [(r.loss, r.grad_norm, r.noise) for r in actual] == [(r.loss, r.grad_norm, r.noise) for r in expected]


@pytest.mark.parametrize(
    "settings", [{"fuse_gradients": "sums"}, {"microbatch": 2}, {"max_grad_norm": None}, {"noise": False}], ids=str
)
def test_other_settings_have_equal_bits(settings: dict[str, Any]):
    plain, narrow = make("none", **settings), make("master", **settings)
    train(plain, 0, 4)
    train(narrow, 0, 4)
    assert weights(narrow) == weights(plain)


def test_weights_of_linear_layers_are_bfloat16_on_device():
    engine = make("master")
    train(engine, 0, 1)
    narrow = {name for name, p in engine.model.named_parameters() if p.dtype is torch.bfloat16}
    assert narrow == {"first.weight", "second.weight", "head.weight"}
    masters = streamed_of(engine).masters()
    assert all(is_in_buffers(master, streamed_of(engine)) for master in masters.values())
    assert all(torch.equal(p, master.bfloat16()) for p, master in masters.items())


class Penalized(Decoder):
    """Its loss reads the weight of a linear layer in float32."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.first.weight.square().sum()


class Cast(Decoder):
    """Multiplies by a weight outside of its layer."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + (self.second.weight * 2).sum(0).mean()


@pytest.mark.parametrize(("kind", "wide"), [(Penalized, "first.weight"), (Cast, "second.weight")])
def test_weight_that_loss_reads_elsewhere_stays_float32(kind: type[nn.Module], wide: str):
    found = []
    for level in ("none", "master"):
        torch.manual_seed(0)
        engine = make(level, model=kind())
        train(engine, 0, 4)
        found.append(weights(engine))
    assert found[0] == found[1]
    dtypes = {name: p.dtype for name, p in engine.model.named_parameters() if name.endswith("t.weight")}
    assert dict(engine.model.named_parameters())[wide].dtype is torch.float32
    assert sum(p.dtype is torch.bfloat16 for p in engine.model.parameters()) == 2, dtypes


def test_tied_weight_stays_float32():
    found = []
    for level in ("none", "master"):
        torch.manual_seed(0)
        model = Decoder()
        model.head.weight = model.embedding.weight
        engine = make(level, model=model)
        train(engine, 0, 4)
        found.append(weights(engine))
    assert found[0] == found[1]
    assert engine.model.embedding.weight.dtype is torch.float32


def test_probe_leaves_no_trace():
    class Noisy(Decoder):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, tokens: Tensor) -> Tensor:
            self.calls += 1
            return F.dropout(super().forward(tokens), 0.5)

    found = []
    for level in ("none", "master"):
        torch.manual_seed(0)
        engine = make(level, model=Noisy())
        torch.manual_seed(1)
        train(engine, 0, 3)
        found.append((weights(engine), torch.get_rng_state().tolist()))
    assert found[0] == found[1]


@pytest.mark.parametrize("levels", [("master", "master"), ("none", "master"), ("master", "none")], ids=str)
@pytest.mark.parametrize("name", ["adamw", "sgd", "nadam", "adafactor"])
def test_resumed_run_has_equal_bits(name: str, levels: tuple[str, str], tmp_path: Path):
    expected, before, after = make("none", name), make(levels[0], name), make(levels[1], name, seed=1)
    train(expected, 0, 6)
    train(before, 0, 3)
    torch.save(before.state_dict(), tmp_path / "state.pt")
    after.load_state_dict(torch.load(tmp_path / "state.pt"))
    train(after, 3, 6)
    assert weights(after) == weights(expected)
    assert states(after) == states(expected)


def test_state_loads_into_narrow_engine():
    expected, source, target = make("none"), make("master"), make("master", seed=1)
    train(expected, 0, 5)
    train(source, 0, 3)
    train(target, 0, 2)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    train(target, 3, 5)
    assert weights(target) == weights(expected)


def test_load_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    engine, other, expected = make("master"), make("none", seed=1), make("none")
    train(engine, 0, 2)
    train(other, 0, 1)
    train(expected, 0, 4)
    with monkeypatch.context() as patch:
        patch.setattr("bigbatch.accumulation.training_state.set_random_states", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.load_state_dict(other.state_dict())
    train(engine, 2, 4)
    assert weights(engine) == weights(expected)


def test_failure_at_any_transfer_loses_nothing(link: Link):
    engine = make("master")
    train(engine, 0, 2)
    saved = copy.deepcopy(engine.state_dict())
    link.arm(0, broken)
    train(engine, 2, 3)
    num_transfers = link.num
    train(engine, 3, 4)
    expected = weights(engine), states(engine)
    torn = []
    for at in range(1, num_transfers + 1):
        engine = make("master")
        train(engine, 0, 2)
        before = weights(engine)
        link.arm(at, broken)
        with pytest.raises(RuntimeError) as caught:
            train(engine, 2, 3)
        link.arm(0, broken)
        torn.append(type(caught.value) is TornUpdateError)
        if torn[-1]:
            engine.load_state_dict(saved)
        assert weights(engine) == before
        train(engine, 2, 4)
        assert (weights(engine), states(engine)) == expected
    assert torn == sorted(torn)
    assert not torn[0]
    assert torn[-1]


def test_window_with_infinite_gradient_changes_nothing():
    engine = make("master")
    train(engine, 0, 2)
    before = weights(engine), states(engine)
    counts = copy.copy(streamed_of(engine).transfers.counts)
    calls: list[int] = []

    def infinite(gradient: Tensor) -> Tensor:
        calls.append(1)
        return gradient * torch.inf

    handle = engine.model.norm.weight.register_hook(infinite)
    assert engine.step(make_tokens(2)).skipped == "non-finite gradient"
    handle.remove()
    assert calls
    assert (weights(engine), states(engine)) == before
    assert streamed_of(engine).transfers.counts == counts


def test_microbatch_that_runs_out_of_memory_is_repeated():
    found = []
    for level in ("none", "master"):
        calls = [0] * (level == "none")  # the probe is the first call of the other

        def failing(model: nn.Module, tokens: Tensor, calls: list[int] = calls) -> tuple[Tensor, int]:
            calls.append(len(tokens))
            if len(calls) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return decoder_loss(model, tokens)

        engine = make(level, loss_fn=failing)
        assert engine.step(make_tokens(0)).retries == 1
        found.append(weights(engine))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("level", "before", "what"),
    [("master", 0, "within the step of AdamW"), ("gradients", 1, "for the norm"), ("gradients", 2, "within the step")],
)
def test_device_without_room_changes_nothing(level: str, before: int, what: str, monkeypatch: pytest.MonkeyPatch):
    """At "gradients" after the slots of sums, and after the memory for the norm."""
    engine, expected = make(level), make("none")
    train(engine, 0, 2)
    train(expected, 0, 3)
    original, calls = Transfers.device_memory, [0]

    def full(self: Transfers, num_bytes: int) -> Tensor:
        calls[0] += 1
        if calls[0] <= before:
            return original(self, num_bytes)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 192.00 MiB")

    with monkeypatch.context() as patch:
        patch.setattr(Transfers, "device_memory", full)
        with pytest.raises(MemoryLimitError, match=f"^memory ran out {what}.*nothing was updated"):
            train(engine, 2, 3)
    train(engine, 2, 3)
    assert weights(engine) == weights(expected)
    assert states(engine) == states(expected)


def test_whole_weights_are_float32_inside():
    engine = make("master")
    train(engine, 0, 2)
    expected = weights(engine)
    with engine.whole_weights():
        found = {name: tensor.tolist() for name, tensor in engine.model.state_dict().items()}
        assert all(p.dtype is torch.float32 for p in engine.model.parameters())
    assert found == expected
    assert engine.model.first.weight.dtype is torch.bfloat16
    train(engine, 2, 3)


def test_group_that_is_added_between_windows_is_narrowed():
    found = []
    for level in ("none", "master"):
        torch.manual_seed(0)
        model = Decoder()
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(parameters[:-1], lr=0.01)
        engine = make_engine(model, optimizer, level, loss_fn=decoder_loss)
        train(engine, 0, 2)
        optimizer.add_param_group({"params": parameters[-1:], "lr": 0.02})
        train(engine, 2, 4)
        found.append(weights(engine))
    assert found[0] == found[1]


def test_write_to_narrow_weight_is_refused():
    engine = make("master")
    train(engine, 0, 1)
    with torch.no_grad():
        engine.model.first.weight.mul_(2)
    with pytest.raises(
        WindowStateError,
        match=r'^the weight first\.weight was written to by other code, and with offload="master" its value in float32 '
        r"is in host memory, which the next update would write back: change weights with engine\.load_state_dict\(\), "
        r"or before the engine is made\.$",
    ):
        train(engine, 1, 2)


def test_loss_without_autocast_is_refused():
    def plain(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        return model(tokens).square().sum(), tokens.numel()

    with pytest.raises(
        InputError,
        match=r'^offload="master" keeps weights of linear layers in bfloat16 on the device, and the loss does not run '
        r"with them \(.*dtype.*\): compute it under torch\.autocast with dtype=torch\.bfloat16, or pass "
        r'offload="optimizer"\.$',
    ):
        train(make("master", loss_fn=plain), 0, 1)


def test_model_without_linear_layer_is_refused():
    model = nn.Sequential(nn.Embedding(30, 4))
    with pytest.raises(
        InputError,
        match=r'^offload="master" is for float32 weights of torch\.nn\.Linear layers, each of one layer, and the '
        r'optimizer has none: pass offload="optimizer"\.$',
    ):
        make_engine(model, ADAMW(list(model.parameters())), "master")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"gradient_hook": print}, "gradient_hook="),
        ({"scaler": torch.amp.GradScaler("cpu")}, "a GradScaler"),
        ({"reproducible": True, "quantum": 2}, "reproducible=True"),
    ],
)
def test_setting_that_excludes_master_is_refused(settings: dict[str, Any], name: str):
    with pytest.raises(InputError) as caught:
        make("master", **settings)
    assert str(caught.value) == (
        f'offload="master" is not supported with {name}: weights are bfloat16 on the device, and their float32 '
        'gradients and values meet within the step only. Pass offload="optimizer", or remove the other.'
    )


def test_gradient_without_step_is_refused():
    engine = make("master")
    with pytest.raises(
        WindowStateError,
        match=r'^offload="master" keeps weights in bfloat16 on the device, and a gradient in \.grad would be rounded '
        r'to it: call step\(\), or pass offload="optimizer"\.$',
    ):
        engine.backward(make_tokens(0))


def test_own_loop_is_refused():
    model = Decoder()
    accumulator = bigbatch.Accumulator(model, ADAMW(list(model.parameters())), offload="master")
    with pytest.raises(
        InputError,
        match=r'^offload="master" looks at the loss before the first window, which an Accumulator does not know: use '
        r'bigbatch\.Engine, or pass offload="optimizer"\.$',
    ):
        accumulator.window()


def test_ranks_have_equal_bits(pools: Pools):
    plain = pools(2).run(rank_runs.train_decoder, "none", 5)
    narrow = pools(2).run(rank_runs.train_decoder, "master", 5)
    assert narrow == plain
    assert narrow[0] == narrow[1]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_training_run_has_equal_bits(kind: str, tmp_path: Path):
    model = str(save_model_folder(tmp_path / "model", kind=kind))
    data = str(write_jsonl(tmp_path / "data.jsonl", records(24)))
    found = []
    for level in ("none", "master"):
        settings = {"model": model, "data": (data,), "global_batch": 4, "microbatch": 2, "max_length": 32, "lr": 0.01}
        settings |= {"steps": 4, "checkpoint_every": 2, "validation_every": 2, "deterministic": True}
        run(tmp_path / level, **settings, precision="bf16", offload=level)
        found.append(load_file(tmp_path / level / "model" / "model.safetensors"))
    assert {name: t.dtype for name, t in found[1].items()} == {name: t.dtype for name, t in found[0].items()}
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_training_run_without_autocast_is_refused(tmp_path: Path):
    model = str(save_model_folder(tmp_path / "model"))
    data = str(write_jsonl(tmp_path / "data.jsonl", records(24)))
    with pytest.raises(
        InputError,
        match=r"^--offload master needs --precision bf16, and this run computes in float32: pass --offload "
        r"optimizer\.$",
    ):
        run(tmp_path / "run", model=model, data=(data,), steps=1, precision="float32", offload="master")


def test_wrapped_model_is_refused(pools: Pools):
    (message, _) = pools(2).run(rank_runs.refuse_wrapped)
    assert message == (
        'offload="master" changes the dtype of parameters, which DistributedDataParallel does not follow: pass the '
        "model without it, and sync=bigbatch.Replicated(model)."
    )
