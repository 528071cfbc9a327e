"""offload="gradients": gradient sums in host memory, and the bits of a run without it."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ReferenceType, ref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bigbatch
from bigbatch.engine.host_check import predicted_host_bytes
from bigbatch.errors import InputError, TornUpdateError, WindowStateError
from bigbatch.offload import sum_streamer
from bigbatch.offload.costs import link_bytes
from bigbatch.offload.host_sums import HostSums
from bigbatch.offload.state_chunk import StateChunk
from bigbatch.offload.transfers import Transfers
from offload import rank_runs
from offload.models import (
    OPTIMIZERS,
    Decoder,
    decoder_loss,
    loss_fn,
    make,
    make_batch,
    make_engine,
    make_model,
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


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Link:
    return Link(monkeypatch)


def everything(engine: bigbatch.Engine) -> tuple[Any, Any]:
    return weights(engine), states(engine)


def sums_of(engine: bigbatch.Engine) -> HostSums:
    offload = engine.accumulator.update.offload
    assert offload is not None
    assert offload.sums is not None
    return offload.sums


# the same result ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_except(OPTIMIZERS, "adamw", "sgd", "muon"))
def test_twenty_updates_have_equal_bits(name: str):
    plain, offloaded = make("none", name), make("gradients", name)
    reports = [train(engine, 0, 20) for engine in (plain, offloaded)]
    assert everything(offloaded) == everything(plain)
    assert [(r.grad_norm, r.noise, r.loss) for r in reports[1]] == [(r.grad_norm, r.noise, r.loss) for r in reports[0]]
    offload = offloaded.accumulator.update.offload
    assert offload is not None
    assert len(offload.weights.narrowed) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_without_autocast_have_equal_bits(dtype: torch.dtype):
    found = []
    for level in ("none", "gradients"):
        engine = make(level, model=make_model(dtype=dtype), loss_fn=loss_fn)
        for number in range(20):
            engine.step(make_batch(number, dtype=dtype))
        found.append(everything(engine))
    assert found[0] == found[1]
    assert next(engine.model.parameters()).dtype is dtype  # none is narrow: the loss does not run with them


@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": None, "microbatch": 8},
        {"noise": False, "microbatch": 1},
        {"lengths": lambda tokens: [6] * len(tokens), "microbatch": bigbatch.TokenBudget(12)},
    ],
    ids=["no clip", "no noise scale", "token budget"],
)
def test_other_settings_have_equal_bits(settings: dict[str, Any]):
    plain, offloaded = make("none", **settings), make("gradients", **settings)
    train(plain, 0, 5)
    train(offloaded, 0, 5)
    assert everything(offloaded) == everything(plain)


@pytest.mark.parametrize("is_tied", [False, True])
def test_parameter_that_is_used_twice_has_equal_bits(is_tied: bool):
    def model() -> Decoder:
        torch.manual_seed(3)
        decoder = Decoder()
        if is_tied:
            decoder.head.weight = decoder.embedding.weight
        else:
            decoder.second.weight.data = decoder.second.weight.data.t().contiguous().t()  # gradients with other strides
        return decoder

    plain, offloaded = make("none", model=model()), make("gradients", model=model())
    train(plain, 0, 5)
    train(offloaded, 0, 5)
    assert everything(offloaded) == everything(plain)


def checkpointed_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    hidden = batch[0].requires_grad_()
    for layer in model:  # type: ignore[attr-defined]
        hidden = checkpoint(layer, hidden, use_reentrant=True)
    return F.cross_entropy(hidden, batch[1], reduction="sum"), len(batch[1])


@pytest.mark.parametrize(
    "settings",
    [
        {"check": True},
        {"loss_fn": checkpointed_loss},
        {"batch_norm": "exact"},
        {
            "loss_fn": bigbatch.Coupled(
                lambda model, batch: model(batch[0]), lambda _, features: features.square().mean()
            )
        },
    ],
    ids=["checked first window", "reentrant checkpoints", "exact batch norm", "coupled loss"],
)
def test_other_windows_have_equal_bits(settings: dict[str, Any]):
    found = []
    for level in ("none", "gradients"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Linear(12, 3))
        engine = make_engine(model, OPTIMIZERS["adamw"](list(model.parameters())), level, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the check
            for number in range(4):
                engine.step(make_batch(number))
        found.append(everything(engine))
    assert found[0] == found[1]


def test_copied_engine_has_sums_of_its_own():
    engine = make("gradients", model=make_model(), loss_fn=loss_fn)
    engine.step(make_batch(0))
    copied = copy.deepcopy(engine)
    for each in (copied, engine):
        each.step(make_batch(1))
        each.step(make_batch(2))
    assert everything(copied) == everything(engine)
    assert sums_of(copied) is not sums_of(engine)


def test_copy_with_narrow_weights_is_refused():
    engine = make("gradients")
    train(engine, 0, 1)
    with pytest.raises(InputError, match=r'^an update with offload="gradients" cannot be copied: its weights are in'):
        copy.deepcopy(engine)


def test_microbatch_is_chosen_without_autocast():
    engine = make("gradients", model=make_model(), loss_fn=loss_fn, microbatch="auto", memory="80%")
    engine.step(make_batch(0))
    assert engine.choice is not None
    assert all(p.dtype is torch.float32 for p in engine.model.parameters())


def test_frozen_parameter_has_no_sum():
    plain, offloaded = make("none"), make("gradients")
    for engine in (plain, offloaded):
        engine.model.first.requires_grad_(False)
        train(engine, 0, 2)
        engine.model.first.requires_grad_(True)
        train(engine, 2, 4)
    assert everything(offloaded) == everything(plain)


def test_group_that_is_added_between_windows_is_streamed():
    found = []
    for level in ("none", "gradients"):
        torch.manual_seed(0)
        model = Decoder()
        rest = [p for name, p in model.named_parameters() if not name.startswith("first")]
        optimizer = torch.optim.AdamW(rest, lr=0.01)
        engine = make_engine(model, optimizer, level, loss_fn=decoder_loss)
        train(engine, 0, 2)
        optimizer.add_param_group({"params": list(model.first.parameters()), "lr": 0.02})
        train(engine, 2, 4)
        found.append(everything(engine))
    assert found[0] == found[1]


def test_own_loop_has_equal_bits():
    found = []
    for level in ("none", "gradients"):
        torch.manual_seed(0)
        model = Decoder()
        optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
        accumulator = bigbatch.Accumulator(model, optimizer, offload=level, max_grad_norm=0.1)  # type: ignore[arg-type]
        parts = [make_tokens(number, 2) for number in range(12)]
        for window in accumulator.windows(parts, num_microbatches=4):
            for tokens in window:
                loss, items = decoder_loss(model, tokens)
                window.backward(loss, items=items)
            window.step()
        found.append([p.tolist() for p in model.parameters()])
    assert found[0] == found[1]


@pytest.mark.parametrize("levels", [("gradients", "none"), ("none", "gradients"), ("gradients", "gradients")])
def test_resumed_run_has_equal_bits(levels: tuple[str, str], tmp_path: Path):
    expected = make("none")
    train(expected, 0, 4)
    engine = make(levels[0])
    train(engine, 0, 2)
    torch.save(engine.state_dict(), tmp_path / "state.pt")
    resumed = make(levels[1])
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=False))
    train(resumed, 2, 4)
    assert everything(resumed) == everything(expected)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_ranks_have_equal_bits(pools: Pools, name: str):
    plain = pools(2).run(rank_runs.train, name, "none", 6)
    offloaded = pools(2).run(rank_runs.train, name, "gradients", 6)
    assert [(each["values"], each["states"]) for each in offloaded] == [(e["values"], e["states"]) for e in plain]


def test_ranks_with_narrow_weights_have_equal_bits(pools: Pools):
    plain = pools(2).run(rank_runs.train_decoder, "none", 5)
    assert pools(2).run(rank_runs.train_decoder, "gradients", 5) == plain


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_training_run_has_equal_bits(precision: str, tmp_path: Path):
    model = str(save_model_folder(tmp_path / "model"))
    data = str(write_jsonl(tmp_path / "data.jsonl", records(24)))
    found = []
    for level in ("none", "gradients"):
        settings = {"model": model, "data": (data,), "global_batch": 4, "microbatch": 2, "max_length": 32, "lr": 0.01}
        settings |= {"steps": 4, "checkpoint_every": 2, "validation_every": 2, "deterministic": True}
        run(tmp_path / level, **settings, precision=precision, offload=level)
        found.append(load_file(tmp_path / level / "model" / "model.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# where gradients are -----------------------------------------------------------------------------------------------


def test_no_gradient_stays_on_device():
    seen: list[bool] = []

    def looking(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        seen.append(all(p.grad is None for p in model.parameters()))
        return decoder_loss(model, tokens)

    engine = make("gradients", loss_fn=looking)
    train(engine, 0, 2)
    assert len(seen) == 5  # the probe, and two micro-batches of each window
    assert all(seen)
    assert all(p.grad is None for p in engine.model.parameters())


def test_host_waits_for_no_copy_between_microbatches(monkeypatch: pytest.MonkeyPatch):
    """It waits once when the window has run, and in the update."""
    seen: list[str] = []

    def noting(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        seen.append("loss")
        return decoder_loss(model, tokens)

    engine = make("gradients", loss_fn=noting, microbatch=2)
    train(engine, 0, 1)
    seen.clear()
    for name in ("wait", "finish"):
        monkeypatch.setattr(Transfers, name, lambda *_: seen.append("wait"))
    train(engine, 1, 2)
    first, last = seen.index("loss"), len(seen) - 1 - seen[::-1].index("loss")
    assert seen[first : last + 1] == ["loss"] * 4
    assert "wait" in seen[last:]


def test_every_sum_crosses_once_each_way():
    """In each micro-batch, to the device from the second on; and twice to it in the update, first for the norm."""
    engine = make("gradients", microbatch=2)
    train(engine, 0, 1)
    streamed = streamed_of(engine)
    before = copy.copy(streamed.transfers.counts)
    train(engine, 1, 2)
    counts = streamed.transfers.counts
    numel = sum(p.numel() for p in engine.model.parameters())
    state = sum(chunk.num_bytes for chunk in streamed.chunks)
    sums = sum(chunk.host_bytes for chunk in streamed.chunks) - state
    assert sums >= 4 * numel
    assert counts.bytes_to_host - before.bytes_to_host == 4 * 4 * numel + state
    assert counts.bytes_to_device - before.bytes_to_device == 3 * 4 * numel + state + 2 * sums


@pytest.mark.parametrize("level", ["optimizer", "master", "gradients"])
def test_bytes_that_cross_are_those_that_are_predicted(level: str):
    """Each tensor in the host memory is rounded up to 256 bytes."""
    engine = make(level, microbatch=2)
    before_state = predicted_host_bytes(engine.accumulator)
    train(engine, 0, 1)
    streamed = streamed_of(engine)
    assert predicted_host_bytes(engine.accumulator) == before_state
    link, before = link_bytes(*before_state), copy.copy(streamed.transfers.counts)
    train(engine, 1, 2)  # four micro-batches
    counts = streamed.transfers.counts
    rounding = 256 * sum(len(c.entries) + 2 * len(c.sums.entries if c.sums else ()) for c in streamed.chunks)
    to_device = counts.bytes_to_device - before.bytes_to_device
    to_host = counts.bytes_to_host - before.bytes_to_host
    assert 0 <= to_device - link.to_card - 3 * link.per_microbatch < rounding
    assert 0 <= to_host - link.to_host - 4 * link.per_microbatch < rounding
    assert rounding < link.to_host


def test_memory_of_host_and_windows_is_counted():
    """Four slots of 1,024 bytes, and as many of gradients that are not added yet."""
    engine = make("gradients")
    train(engine, 0, 1)
    offload = engine.accumulator.update.offload
    assert offload is not None
    assert offload.host_bytes == sum(c.host_bytes for c in streamed_of(engine).chunks)
    assert offload.window_bytes == 2 * 4 * 1024
    assert sums_of(engine).streamer.device_bytes(10_000) == 4 * 1024 + 10_000


def test_slots_of_sums_are_freed_before_the_update(monkeypatch: pytest.MonkeyPatch):
    """Of two windows: the slots, then memory for the norm, then for the update."""
    allocated: list[ReferenceType[Tensor]] = []
    exist_already: list[int] = []
    original = Transfers.device_memory

    def allocate(self: Transfers, num_bytes: int) -> Tensor:
        exist_already.append(sum(reference() is not None for reference in allocated))
        memory = original(self, num_bytes)
        allocated.append(ref(memory))
        return memory

    monkeypatch.setattr(Transfers, "device_memory", allocate)
    train(make("gradients"), 0, 2)
    assert exist_already == [0] * 6


@pytest.mark.parametrize("numel", [1, 255, 300_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm_has_the_bits_of_sums_on_the_device(numel: int, dtype: torch.dtype):
    parameters = [nn.Parameter(torch.zeros(numel, 3, dtype=dtype)), nn.Parameter(torch.zeros(5, dtype=dtype))]
    parameters += [nn.Parameter(torch.zeros(7, 11, dtype=dtype).t()), nn.Parameter(torch.zeros(3, dtype=dtype))]
    optimizer = torch.optim.SGD(parameters)
    sums = HostSums(Transfers(torch.device("cpu")))
    sums.prepare([StateChunk(optimizer.param_groups[0], tuple(part)) for part in (parameters[:1], parameters[1:])])
    generator = torch.Generator().manual_seed(1)
    gradients = [
        torch.empty_like(p.detach()).copy_(1e-3 + 1e-4 * torch.randn(p.shape, generator=generator, dtype=dtype))
        for p in parameters[:3]
    ]
    for parameter, gradient in zip(parameters, gradients, strict=False):
        sums.add(parameter, gradient)
    sums.settle()
    norms = sums.norms([sums.float32[parameter] for parameter in reversed(parameters[:3])])
    assert torch.equal(torch.nn.utils.get_total_norm(norms), torch.nn.utils.get_total_norm(gradients[::-1]))


def test_microbatch_is_chosen_without_memory_for_sums(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sum_streamer, "SUM_SLOT_BYTES", 256)
    peaks = {}
    for level in ("master", "gradients"):
        engine = make(level, microbatch="auto", memory="80%")
        engine.step(make_tokens(0))
        choice = engine.choice
        assert choice is not None
        peaks[level] = choice.peak_bytes
    assert peaks["gradients"] <= peaks["master"] - 2 * sum(p.numel() for p in engine.model.parameters())


# failures ----------------------------------------------------------------------------------------------------------


def test_failure_at_any_transfer_loses_nothing(link: Link):
    engine = make("gradients")
    train(engine, 0, 2)
    saved = copy.deepcopy(engine.state_dict())
    link.arm(0, broken)
    train(engine, 2, 3)
    num_transfers = link.num
    train(engine, 3, 4)
    expected = everything(engine)
    torn, in_part = [], 0
    for at in range(1, num_transfers + 1):
        engine = make("gradients")
        train(engine, 0, 2)
        before = weights(engine)
        link.arm(at, broken)
        with pytest.raises(RuntimeError) as caught:
            train(engine, 2, 3)
        link.arm(0, broken)
        torn.append(type(caught.value) is TornUpdateError)
        in_part += type(caught.value) is WindowStateError
        if torn[-1]:
            engine.load_state_dict(saved)
        assert weights(engine) == before
        train(engine, 2, 4)
        assert everything(engine) == expected
    assert torn == sorted(torn)
    assert in_part
    assert not torn[0]
    assert torn[-1]


def test_failure_of_any_addition_loses_nothing(monkeypatch: pytest.MonkeyPatch):
    """On the device, between the copies of a part of a sum."""
    calls, fails_at, in_window = [0], [0], [0]

    def use(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == fails_at[0]:
            broken()

    monkeypatch.setattr(Transfers, "use", use)
    engine = make("gradients")
    train(engine, 0, 2)
    original = engine.accumulator.update.apply

    def noting(*arguments: Any, **settings: Any) -> Any:
        in_window[0] = calls[0]
        return original(*arguments, **settings)

    engine.accumulator.update.apply = noting  # type: ignore[method-assign]
    calls[0] = 0
    train(engine, 2, 3)
    expected = everything(engine)
    assert in_window[0] > 10
    in_part = 0
    for at in range(1, in_window[0] + 1):
        engine = make("gradients")
        train(engine, 0, 2)
        before = everything(engine)
        calls[0], fails_at[0] = 0, at
        with pytest.raises(RuntimeError) as caught:
            train(engine, 2, 3)
        fails_at[0] = 0
        in_part += type(caught.value) is WindowStateError
        assert everything(engine) == before
        train(engine, 2, 3)
        assert everything(engine) == expected
    assert 0 < in_part < in_window[0]


def test_gradient_that_was_added_in_part_ends_the_window(link: Link):
    engine = make("gradients")
    train(engine, 0, 2)
    link.arm(2, broken)
    with pytest.raises(
        WindowStateError,
        match=r"^a gradient was added to its sum in host memory in part \(CUDA error: an illegal memory access was "
        r"encountered\), and the window has changed nothing: run it again\.$",
    ):
        train(engine, 2, 3)


def test_device_that_fails_after_last_microbatch_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    engine, expected = make("gradients"), make("none")
    train(engine, 0, 2)
    train(expected, 0, 3)
    before = everything(engine)
    with monkeypatch.context() as patch:
        patch.setattr(sum_streamer.SumStreamer, "wait", lambda _: broken())
        with pytest.raises(RuntimeError, match="an illegal memory access"):
            train(engine, 2, 3)
    assert everything(engine) == before
    train(engine, 2, 3)
    assert everything(engine) == everything(expected)


def test_device_without_room_for_slots_repeats_the_microbatch(monkeypatch: pytest.MonkeyPatch):
    engine, expected = make("gradients"), make("none")
    train(engine, 0, 1)
    train(expected, 0, 2)
    original, calls = Transfers.device_memory, [0]

    def full(self: Transfers, num_bytes: int) -> Tensor:
        calls[0] += 1
        if calls[0] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 MiB")
        return original(self, num_bytes)

    monkeypatch.setattr(Transfers, "device_memory", full)
    assert train(engine, 1, 2)[0].retries == 1
    assert everything(engine) == everything(expected)


def test_memory_that_runs_out_at_any_copy_counts_samples_once(link: Link):
    """A gradient of which a part was added already is not added again: the window ends, and changes nothing."""

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    engine = make("gradients")
    train(engine, 0, 2)
    before = everything(engine)
    in_window: list[int] = []
    original = engine.accumulator.update.apply

    def noting(*arguments: Any, **settings: Any) -> Any:
        in_window.append(link.num)
        return original(*arguments, **settings)

    engine.accumulator.update.apply = noting  # type: ignore[method-assign]
    link.arm(0, full)
    train(engine, 2, 3)
    expected = everything(engine)
    retries = []
    for at in range(1, in_window[0] + 1):
        engine = make("gradients")
        train(engine, 0, 2)
        link.arm(at, full)
        try:
            retries.append(train(engine, 2, 3)[0].retries)
        except WindowStateError:
            link.arm(0, full)
            assert everything(engine) == before
            train(engine, 2, 3)
            retries.append(0)
        link.arm(0, full)
        assert everything(engine) == expected
    assert 0 < sum(retries) < len(retries)


def test_microbatch_that_runs_out_of_memory_is_repeated():
    found = []
    for level in ("none", "gradients"):
        calls = [0] * (level == "none")  # the probe is the first call of the other

        def failing(model: nn.Module, tokens: Tensor, calls: list[int] = calls) -> tuple[Tensor, int]:
            calls.append(len(tokens))
            if len(calls) in (3, 4):  # at once, and again: in halves then
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return decoder_loss(model, tokens)

        engine = make(level, loss_fn=failing)
        assert engine.step(make_tokens(0)).retries == 2
        found.append(weights(engine))
    assert found[0] == found[1]


def test_window_with_infinite_gradient_changes_nothing():
    engine, expected = make("gradients"), make("none")
    train(engine, 0, 2)
    train(expected, 0, 3)
    before = everything(engine)
    handle = engine.model.norm.weight.register_hook(lambda gradient: gradient * torch.inf)
    assert engine.step(make_tokens(2)).skipped == "non-finite gradient"
    handle.remove()
    assert everything(engine) == before
    train(engine, 2, 3)
    assert everything(engine) == everything(expected)


def test_loss_that_raises_changes_nothing():
    fails = [False]

    def failing(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        loss, items = decoder_loss(model, tokens)
        if fails[0] and len(sums_of(engine).float32):
            raise ZeroDivisionError("of the user")
        return loss, items

    engine, expected = make("gradients", loss_fn=failing), make("none")
    train(engine, 0, 2)
    train(expected, 0, 3)
    before, fails[0] = everything(engine), True
    with pytest.raises(ZeroDivisionError):
        train(engine, 2, 3)
    fails[0] = False
    assert everything(engine) == before
    train(engine, 2, 3)
    assert everything(engine) == everything(expected)


def test_window_that_is_aborted_leaves_no_sum():
    model = make_model()
    accumulator = bigbatch.Accumulator(model, OPTIMIZERS["adamw"](list(model.parameters())), offload="gradients")
    window = accumulator.window()
    loss, items = loss_fn(model, make_batch(0))
    window.backward(loss, items=items)
    window.abort()
    expected = make_model()
    other = bigbatch.Accumulator(expected, OPTIMIZERS["adamw"](list(expected.parameters())))
    for each in (accumulator, other):
        window = each.window()
        loss, items = loss_fn(each.model, make_batch(1))
        window.backward(loss, items=items)
        window.step()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), expected.parameters(), strict=True))


# refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"gradient_hook": lambda parameters: None},
            r'^offload="gradients" is not supported with gradient_hook=: the gradient sums are in host memory, and '
            r'reach the device part by part within the step only\. Pass offload="optimizer", or remove the other\.$',
        ),
        ({"reproducible": True, "quantum": 2}, r'^offload="gradients" is not supported with reproducible=True: '),
        ({"scaler": torch.amp.GradScaler("cpu")}, r'^offload="gradients" is not supported with a GradScaler: '),
        (
            {"fuse_gradients": True},
            r'^fuse_gradients=True can fuse nothing: offload="gradients" sums gradients in host memory; leave it out',
        ),
        (
            {"cuda_graphs": True},
            r'^cuda_graphs=True is not supported with offload="gradients", which copies gradient sums from and to host '
            r'memory in each micro-batch: leave it out, or pass offload="master"\.$',
        ),
    ],
    ids=["gradient_hook", "reproducible", "scaler", "fuse_gradients", "cuda_graphs"],
)
def test_setting_that_excludes_gradients_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        make("gradients", **settings)


def test_gradient_without_step_is_refused():
    engine = make("gradients")
    with pytest.raises(
        WindowStateError,
        match=r'^offload="gradients" keeps gradients in host memory, and in \.grad they would be on the device: call '
        r'step\(\), or pass offload="optimizer"\.$',
    ):
        engine.backward(make_tokens(0))
    train(engine, 0, 1)


def test_sparse_gradient_is_refused():
    model = nn.Sequential(nn.Embedding(30, 16, sparse=True), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        return model(tokens).sum(), tokens.numel()

    engine = make_engine(model, optimizer, "gradients", loss_fn=loss, noise=False)
    with pytest.raises(
        InputError,
        match=r'^the gradient of a parameter of shape \(30, 16\) is sparse, and offload="gradients" sums whole tensors '
        r'in host memory: use sparse=False, or pass offload="master"\.$',
    ):
        engine.step(make_tokens(0))


def test_parameter_that_is_unfrozen_within_window_is_refused():
    def thawing(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        if len(sums_of(engine).float32):
            model.first.requires_grad_(True)
        return decoder_loss(model, tokens)

    engine = make("gradients", loss_fn=thawing)
    engine.model.first.requires_grad_(False)
    with pytest.raises(
        WindowStateError,
        match=r"^a parameter of shape \(40(, 16)?,?\) requires a gradient since the window opened, and "
        r'offload="gradients" allocates sums between windows: call requires_grad_\(\) there\.$',
    ):
        train(engine, 0, 1)


def _backward(engine: bigbatch.Engine) -> None:
    decoder_loss(engine.model, make_tokens(9))[0].backward()


def _write(engine: bigbatch.Engine) -> None:
    engine.model.norm.weight.grad = torch.ones_like(engine.model.norm.weight)


@pytest.mark.parametrize("act", [_backward, _write])
def test_other_code_that_changes_gradients_is_refused(act: Callable[[bigbatch.Engine], None]):
    acts = [False]

    def meddling(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        if acts[0] and len(sums_of(engine).float32):
            act(engine)
        return decoder_loss(model, tokens)

    engine, expected = make("gradients", loss_fn=meddling), make("none")
    train(engine, 0, 1)
    train(expected, 0, 2)
    acts[0] = True
    with pytest.raises(WindowStateError, match=r"^the gradients of this window were changed since its last backward"):
        train(engine, 1, 2)
    acts[0] = False
    train(engine, 1, 2)
    assert everything(engine) == everything(expected)


def test_pre_hook_that_would_miss_gradients_is_refused():
    engine = make("gradients", model=make_model(), loss_fn=loss_fn)
    engine.step(make_batch(0))
    handle = engine.accumulator.update.optimizers[0].register_step_pre_hook(lambda *_: None)
    with pytest.raises(
        RuntimeError,
        match=r"^AdamW\.step\(\) has a pre-hook, which would not see the gradients in host memory: remove the hook, or "
        r'pass offload="optimizer"\.$',
    ):
        engine.step(make_batch(1))
    handle.remove()
    engine.step(make_batch(1))


def test_loss_without_gradient_is_refused():
    engine = make("gradients", model=make_model(), loss_fn=lambda model, batch: (F.relu(batch[0]).sum(), 1))
    with pytest.raises(ValueError, match="does not depend on any parameter"):
        engine.step(make_batch(0))
