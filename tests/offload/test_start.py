"""A model that `move_to_device` moves: float32 values of narrow weights never reach the device as a whole."""

import copy
import gc
import weakref
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import bigbatch
from bigbatch.errors import InputError, MemoryLimitError, WindowStateError
from bigbatch.offload import host_memory, model_move
from bigbatch.offload.host_values import host_value
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
from offload.test_master_level import Cast, Penalized
from support.process_pool import Pools

ADAMW = OPTIMIZERS["adamw"]
NARROW = {"first.weight", "second.weight", "head.weight"}


def moved(level: str, name: str = "adamw", *, seed: int = 0, kind: type[nn.Module] = Decoder, **settings: Any) -> Any:
    """Return an engine like that of `make`, over a model that was moved for its level."""
    torch.manual_seed(seed)
    model = kind()
    early = OPTIMIZERS[name](list(model.parameters()))
    bigbatch.move_to_device(model, "cpu", offload=level)  # type: ignore[arg-type]
    makes_state = name == "adagrad"  # when it is created
    optimizer = early if makes_state else OPTIMIZERS[name](list(model.parameters()))
    return make_engine(model, optimizer, level, **({"loss_fn": decoder_loss} | settings))


def everything(engine: bigbatch.Engine) -> Any:
    return weights(engine), states(engine)


def narrow_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.dtype is torch.bfloat16}


def held_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if host_value(p) is not None}


# the same result ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["master", "gradients"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_have_equal_bits(name: str, level: str):
    plain, narrow = make("none", name), moved(level, name)
    expected, actual = train(plain, 0, 6), train(narrow, 0, 6)
    assert everything(narrow) == everything(plain)
    assert [(r.loss, r.grad_norm, r.noise) for r in actual] == [(r.loss, r.grad_norm, r.noise) for r in expected]
    assert narrow_names(narrow.model) == NARROW


@pytest.mark.parametrize(
    "settings", [{"fuse_gradients": "sums"}, {"microbatch": 2}, {"max_grad_norm": None}, {"noise": False}], ids=str
)
def test_other_settings_have_equal_bits(settings: dict[str, Any]):
    plain, narrow = make("none", **settings), moved("master", **settings)
    train(plain, 0, 4)
    train(narrow, 0, 4)
    assert everything(narrow) == everything(plain)


@pytest.mark.parametrize("level", ["master", "gradients"])
def test_tuned_engine_has_equal_bits(level: str):
    plain, narrow = make("none", microbatch="auto"), moved(level, microbatch="auto")
    for engine in (plain, narrow):
        engine.tune(make_tokens(0))
    assert plain.choice is not None
    narrow.set_microbatch(plain.choice)
    train(plain, 0, 4)
    train(narrow, 0, 4)
    assert everything(narrow) == everything(plain)


@pytest.mark.parametrize("level", ["none", "optimizer"])
def test_engine_of_lower_level_has_float32_weights(level: str):
    torch.manual_seed(0)
    model = bigbatch.move_to_device(Decoder(), "cpu", offload="gradients")
    plain, engine = make("none"), make(level, model=model)
    assert not narrow_names(model)
    assert not held_names(model)
    train(plain, 0, 4)
    train(engine, 0, 4)
    assert everything(engine) == everything(plain)


@pytest.mark.parametrize(("kind", "wide"), [(Penalized, "first.weight"), (Cast, "second.weight")])
@pytest.mark.parametrize("level", ["master", "gradients"])
def test_weight_that_loss_reads_elsewhere_becomes_float32(kind: type[nn.Module], wide: str, level: str):
    torch.manual_seed(0)
    plain, narrow = make("none", model=kind()), moved(level, kind=kind)
    assert narrow_names(narrow.model) == NARROW
    train(plain, 0, 4)
    train(narrow, 0, 4)
    assert everything(narrow) == everything(plain)
    assert narrow_names(narrow.model) == NARROW - {wide}


def test_loss_without_autocast_gets_float32_weights():
    def plain_loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        logits = model(tokens).flatten(0, 1)
        return F.cross_entropy(logits, tokens.flatten(), reduction="sum"), tokens.numel()

    plain, narrow = make("none", loss_fn=plain_loss), moved("gradients", loss_fn=plain_loss)
    train(plain, 0, 4)
    train(narrow, 0, 4)
    assert everything(narrow) == everything(plain)
    assert not narrow_names(narrow.model)


def test_own_loop_gets_float32_weights():
    found = []
    for level in ("none", "gradients"):
        torch.manual_seed(0)
        model = bigbatch.move_to_device(Decoder(), "cpu", offload=level)
        accumulator = bigbatch.Accumulator(model, ADAMW(list(model.parameters())), offload=level)
        for number in range(3):
            with accumulator.window() as window:
                loss_sum, items = decoder_loss(model, make_tokens(number))
                window.backward(loss_sum, items=items)
                window.step()
        found.append([p.tolist() for p in model.parameters()])
    assert found[0] == found[1]


@pytest.mark.parametrize("change", ["freeze", "leave out", "hook", "tie"])
def test_weight_that_is_not_narrowed_becomes_float32(change: str):
    found = []
    for level in ("none", "master"):
        torch.manual_seed(0)
        model = bigbatch.move_to_device(Decoder(), "cpu", offload=level)
        if change == "freeze":
            model.first.weight.requires_grad_(False)
        if change == "hook":
            model.first.weight.register_post_accumulate_grad_hook(lambda _: None)
        if change == "tie":
            model.other = nn.Linear(16, 40)
            model.other.weight = model.first.weight
        parameters = [p for p in model.parameters() if change != "leave out" or p is not model.first.weight]
        engine = make_engine(model, ADAMW(parameters), level, loss_fn=decoder_loss)
        assert model.first.weight.dtype is torch.float32
        train(engine, 0, 4)
        found.append([p.tolist() for p in parameters if p.dtype is torch.float32])
    assert held_names(model) == set()
    expected = {tuple(map(repr, each)) for each in found[0]}
    assert expected >= {tuple(map(repr, each)) for each in found[1]}


def test_parameter_that_leaves_the_optimizer_becomes_float32():
    engine = moved("master")
    group = engine.accumulator.optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not engine.model.first.weight]
    train(engine, 0, 1)
    assert narrow_names(engine.model) == NARROW - {"first.weight"}
    torch.manual_seed(0)
    assert torch.equal(engine.model.first.weight, Decoder().first.weight)


def test_ranks_have_equal_bits(pools: Pools):
    plain = pools(2).run(rank_runs.train_decoder, "none", 5)
    narrow = pools(2).run(rank_runs.train_moved, "master", 5)
    assert narrow == plain
    assert narrow[0] == narrow[1]


# memory ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> list[Transfers]:
    """Collect the copies of moves."""
    found: list[Transfers] = []

    def make_transfers(device: torch.device) -> Transfers:
        found.append(Transfers(device))
        return found[-1]

    monkeypatch.setattr(model_move, "make_transfers", make_transfers)
    return found


@pytest.mark.parametrize("level", ["master", "gradients"])
def test_float32_values_never_cross_before_the_update(level: str, links: list[Transfers]):
    """2 bytes a weight reach the device; of all state that windows need, only the optimizer's comes from there."""
    engine = moved(level)
    num_weights = sum(p.numel() for name, p in engine.model.named_parameters() if name in NARROW)
    (link,) = links
    assert link.counts.bytes_to_device == 2 * num_weights
    assert link.counts.bytes_to_host == 0
    assert narrow_names(engine.model) == held_names(engine.model) == NARROW
    engine.accumulator.prepare()
    counts = streamed_of(engine).transfers.counts
    assert counts.bytes_to_host == sum(8 * p.numel() for p in engine.model.parameters())
    assert counts.bytes_to_device == 0
    wide = make(level)  # moved as a whole: then the float32 values come from the device, too
    wide.accumulator.prepare()
    assert streamed_of(wide).transfers.counts.bytes_to_host == counts.bytes_to_host + 4 * num_weights


def test_device_holds_float32_values_of_one_part(monkeypatch: pytest.MonkeyPatch):
    """While the optimizer's state of this part is created."""
    engine = moved("master")
    held: list[set[str]] = []
    original = torch.optim.AdamW._init_group

    @wraps(original)  # whose parameters are counted
    def init_group(optimizer: Any, *arguments: Any) -> Any:
        held.append(NARROW - narrow_names(engine.model))
        return original(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "_init_group", init_group)
    engine.accumulator.prepare()
    assert max(map(len, held)) == 1
    assert set().union(*held) == NARROW


def test_host_holds_values_twice_for_one_part(monkeypatch: pytest.MonkeyPatch):
    engine = moved("master")
    values = [host_value(p).value for p in engine.model.parameters() if host_value(p) is not None]  # type: ignore[union-attr]
    alive = [(weakref.ref(value), value.nbytes) for value in values]
    total, largest = sum(value.nbytes for value in values), max(value.nbytes for value in values)
    del values
    most = []
    original = Transfers.host_memory

    def allocate(self: Transfers, num_bytes: int) -> Tensor:
        found = original(self, num_bytes)
        gc.collect()
        masters = streamed_of(engine).masters().values()
        pinned = sum(master.nbytes for master in masters if is_in_buffers(master, streamed_of(engine)))
        most.append(pinned + sum(num_bytes for reference, num_bytes in alive if reference() is not None))
        return found

    monkeypatch.setattr(Transfers, "host_memory", allocate)
    engine.accumulator.prepare()
    gc.collect()
    assert not any(reference() is not None for reference, _ in alive)
    assert total <= max(most) <= total + largest
    assert held_names(engine.model) == set()
    assert narrow_names(engine.model) == NARROW
    assert all(is_in_buffers(master, streamed_of(engine)) for master in streamed_of(engine).masters().values())


def test_value_in_a_mapped_file_is_copied(tmp_path: Path):
    """The file would count as free memory, and a part of it would not be freed alone."""
    save_file({"weight": torch.arange(128.0).view(8, 16), "other": torch.zeros(4)}, tmp_path / "model.safetensors")
    layer = nn.Linear(16, 8, bias=False)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        layer.weight.data = file.get_tensor("weight")
        loaded = layer.weight.data_ptr()
        bigbatch.move_to_device(layer, "cpu", offload="master")
    held = host_value(layer.weight)
    assert held is not None
    assert torch.equal(held.value, torch.arange(128.0).view(8, 16))
    assert held.value.data_ptr() != loaded
    assert held.value.untyped_storage().nbytes() == held.value.nbytes


def stack_engine(level: str) -> bigbatch.Engine:
    layers = nn.Sequential(*[nn.Linear(500, 500, bias=False) for _ in range(4)])
    model = bigbatch.move_to_device(layers, "cpu", offload=level)  # type: ignore[arg-type]

    def loss_fn(model: nn.Module, inputs: Tensor) -> tuple[Tensor, int]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(inputs).float().square().sum(), len(inputs)

    return bigbatch.Engine(model, torch.optim.AdamW(model.parameters()), loss_fn, microbatch=1, offload=level)  # type: ignore[arg-type]


@pytest.mark.parametrize(("level", "mib"), [("master", 8.6), ("gradients", 12.4)])
def test_host_without_room_is_refused(level: str, mib: float, monkeypatch: pytest.MonkeyPatch):
    """For each of a million weights 8 bytes of state and 4 of the sum; and once more one of four float32 values."""
    monkeypatch.setattr(host_memory, "host_memory", lambda: (4 * 2**20, 2**40))
    with pytest.raises(MemoryLimitError) as caught:
        stack_engine(level)
    assert str(caught.value) == (
        f"offload {level} needs {mib} MiB of pinned host memory, and 3.0 MiB are available: use a lower level, or free "
        "host memory."
    )
    monkeypatch.setattr(host_memory, "host_memory", lambda: (2**30, 2**40))
    stack_engine(level).step(torch.ones(2, 500))


def test_host_memory_that_runs_out_loses_nothing(monkeypatch: pytest.MonkeyPatch):
    expected, engine = make("none"), moved("master")
    original, calls = Transfers.host_memory, [0]

    def full(self: Transfers, num_bytes: int) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise MemoryLimitError("no host memory")
        return original(self, num_bytes)

    monkeypatch.setattr(Transfers, "host_memory", full)
    with pytest.raises(MemoryLimitError, match=r"^no host memory$"):
        train(engine, 0, 1)
    assert weights(engine) == weights(expected)
    train(engine, 0, 3)
    train(expected, 0, 3)
    assert everything(engine) == everything(expected)


# state before the first window -------------------------------------------------------------------------------------


def test_state_before_first_window_is_float32():
    plain, narrow = make("none"), moved("master")
    state = narrow.state_dict()["model"]
    assert all(tensor.dtype is torch.float32 for tensor in state.values())
    assert weights(narrow) == weights(plain)
    with narrow.whole_weights():
        assert {n: p.tolist() for n, p in narrow.model.named_parameters()} == weights(plain)
    assert narrow_names(narrow.model) == NARROW


@pytest.mark.parametrize("name", ["adamw", "sgd", "nadam", "adafactor", "adagrad"])
@pytest.mark.parametrize("before", ["none", "master", "gradients"])
def test_resumed_run_has_equal_bits(name: str, before: str, tmp_path: Path):
    expected, first, second = make("none", name), moved(before, name), moved("gradients", name, seed=1)
    train(expected, 0, 6)
    train(first, 0, 3)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    train(second, 3, 6)
    assert everything(second) == everything(expected)


def test_state_of_update_zero_is_loaded():
    expected, first, second = make("none"), moved("master"), moved("master", seed=1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(expected, 0, 3)
    train(second, 0, 3)
    assert everything(second) == everything(expected)


def test_load_that_fails_before_first_window_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    engine, other, expected = moved("master"), make("none", seed=1), make("none")
    train(other, 0, 1)
    with monkeypatch.context() as patch:
        patch.setattr("bigbatch.accumulation.training_state.set_random_states", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.load_state_dict(other.state_dict())
    train(engine, 0, 3)
    train(expected, 0, 3)
    assert everything(engine) == everything(expected)


# misuse ------------------------------------------------------------------------------------------------------------


def double(engine_or_model: nn.Module) -> None:
    with torch.no_grad():
        engine_or_model.first.weight.mul_(2)  # type: ignore[union-attr,operator]


def test_write_before_the_engine_is_refused():
    torch.manual_seed(0)
    model = bigbatch.move_to_device(Decoder(), "cpu", offload="master")
    double(model)
    with pytest.raises(WindowStateError, match=r"^the weight first\.weight was written to by other code, and with "):
        make("master", model=model)
    with pytest.raises(
        WindowStateError,
        match=r"^the weight first\.weight was written to by other code while its float32 value was in host memory, and "
        r"that would be lost: change weights before move_to_device\(\)\.$",
    ):
        make("none", model=model)


def test_write_before_the_first_window_is_refused():
    engine = moved("master")
    double(engine.model)
    with pytest.raises(WindowStateError, match=r"^the weight first\.weight was written to by other code, and with "):
        train(engine, 0, 1)


def test_second_engine_of_a_model_takes_the_values():
    expected = make("none")
    first = moved("master")
    second = make("master", model=first.model)
    train(expected, 0, 2)
    train(second, 0, 2)
    assert everything(second) == everything(expected)
    with pytest.raises(WindowStateError) as caught:
        train(first, 0, 1)
    assert str(caught.value).endswith(
        " was left in host memory by move_to_device(), and another engine has taken it: use one engine for a model."
    )


class EagerState(torch.optim.SGD):
    """Makes its state when it is created, as Adagrad of earlier versions of torch."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.01, momentum=0.9)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


@pytest.mark.parametrize("level", ["none", "master"])
def test_state_of_rounded_weights_is_refused(level: str):
    model = bigbatch.move_to_device(Decoder(), "cpu", offload="master")
    with pytest.raises(InputError) as caught:
        make_engine(model, EagerState(model.parameters()), level, loss_fn=decoder_loss)
    assert str(caught.value) == (
        "EagerState has made its state in bfloat16, of weights that move_to_device() has rounded: create the optimizer "
        "before that call."
    )


class Float32Only(torch.optim.SGD):
    """Steps float32 parameters only, and is tried on a miniature: it is not one of torch's."""

    def step(self, closure: Any = None) -> None:
        assert all(p.dtype is torch.float32 for group in self.param_groups for p in group["params"])
        super().step(closure)


def test_optimizer_is_tried_in_float32():
    found = []
    for level in ("none", "master"):
        torch.manual_seed(0)
        model = bigbatch.move_to_device(Decoder(), "cpu", offload=level)
        engine = make_engine(model, Float32Only(model.parameters(), lr=0.1), level, loss_fn=decoder_loss)
        train(engine, 0, 2)
        found.append(weights(engine))
    assert found[0] == found[1]


def test_unknown_level_is_refused():
    with pytest.raises(InputError, match=r"^offload is 'some'"):
        bigbatch.move_to_device(Decoder(), "cpu", offload="some")  # type: ignore[arg-type]


def test_second_move_changes_nothing():
    torch.manual_seed(0)
    model = bigbatch.move_to_device(Decoder(), "cpu", offload="master")
    assert bigbatch.move_to_device(model, "cpu", offload="master") is model
    expected, engine = make("none"), make("master", model=model)
    assert weights(engine) == weights(expected)


# on a card ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["master", "gradients"])
def test_peak_at_start_is_without_float32_values(level: str, monkeypatch: pytest.MonkeyPatch):
    """Weights in bfloat16, and of one part of 64 MiB of state also that and its float32 values."""
    monkeypatch.setattr("bigbatch.offload.streamed_optimizer.CHUNK_BYTES", 64 * 2**20)
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(48)])
    wide_bytes = sum(p.nbytes for p in model.parameters())
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    bigbatch.move_to_device(model, "cuda", offload=level)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine = make_engine(model, optimizer, level, microbatch=8, loss_fn=decoder_loss, noise=False)
    engine.accumulator.prepare()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - base < 0.5 * wide_bytes + 2 * 96 * 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["master", "gradients"])
def test_updates_on_a_card_have_equal_bits(level: str):
    found = []
    for offload in ("none", level):
        torch.manual_seed(0)
        model = bigbatch.move_to_device(Decoder(), "cuda", offload=offload)  # type: ignore[arg-type]
        optimizer = OPTIMIZERS["adamw-fused"](list(model.parameters()))
        engine = make_engine(model, optimizer, offload, loss_fn=decoder_loss, max_grad_norm=None)
        for number in range(6):
            engine.step(make_tokens(number))
        found.append({name: tensor.tolist() for name, tensor in engine.state_dict()["model"].items()})
    assert found[0] == found[1]
