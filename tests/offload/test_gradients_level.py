"""offload="gradients": gradient sums in host memory, and the bits of a run without it."""

import copy
import gc
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bigbatch
from bigbatch.errors import InputError, TornUpdateError, WindowStateError
from bigbatch.offload.host_sums import NORM_BLOCK, HostSums
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


def test_only_the_thread_of_additions_waits_for_copies(monkeypatch: pytest.MonkeyPatch):
    """Until the window ends, which waits once for the thread."""
    names: list[str] = []
    finishes: list[int] = []
    monkeypatch.setattr(Transfers, "wait", lambda *_: names.append(threading.current_thread().name))
    engine = make("gradients")
    train(engine, 0, 1)
    names.clear()
    monkeypatch.setattr(Transfers, "finish", lambda *_: finishes.append(len(names)))
    train(engine, 1, 2)
    assert set(names) == {"bigbatch-host-adder"}
    assert finishes == [len(names)]  # in the update


def test_every_gradient_crosses_once():
    engine = make("gradients")
    train(engine, 0, 1)
    streamed = streamed_of(engine)
    before = copy.copy(streamed.transfers.counts)
    train(engine, 1, 2)
    counts = streamed.transfers.counts
    gradients = 2 * 4 * sum(p.numel() for p in engine.model.parameters())  # of two micro-batches, in float32
    state = sum(chunk.num_bytes for chunk in streamed.chunks)
    sums = sum(chunk.host_bytes for chunk in streamed.chunks) - state
    assert sums >= 4 * sum(p.numel() for p in engine.model.parameters())
    assert counts.bytes_to_host - before.bytes_to_host == gradients + state
    assert counts.bytes_to_device - before.bytes_to_device == state + sums


def test_host_memory_is_counted():
    engine = make("gradients")
    train(engine, 0, 1)
    offload = engine.accumulator.update.offload
    assert offload is not None
    assert offload.host_bytes == sum(c.host_bytes for c in streamed_of(engine).chunks) + 3 * 1024
    assert offload.window_bytes == 3 * 1024


@pytest.mark.parametrize("numel", [NORM_BLOCK + 1, 5 * NORM_BLOCK, 5 * NORM_BLOCK + 77])
def test_norm_of_large_sum_is_that_of_its_blocks(numel: int):
    total = torch.full((numel,), 1e-3) + 1e-4 * torch.randn(numel, generator=torch.Generator().manual_seed(1))
    sums = HostSums(Transfers(torch.device("cpu")))
    found = torch.nn.utils.get_total_norm(sums.norm_parts([total, total[:100]]))
    expected = torch.cat([total, total[:100]]).double().norm()
    assert found.item() == pytest.approx(expected.item(), rel=3e-7)


def test_microbatch_is_chosen_without_memory_for_sums():
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
    calls, fails_at = [0], [0]

    def wait(self: Transfers, copied: Any) -> None:
        calls[0] += 1
        if calls[0] == fails_at[0]:
            broken()

    monkeypatch.setattr(Transfers, "wait", wait)
    engine = make("gradients")
    train(engine, 0, 2)
    calls[0] = 0
    train(engine, 2, 3)
    num_additions = calls[0]
    expected = everything(engine)
    assert num_additions > 10
    for at in range(1, num_additions + 1):
        engine = make("gradients")
        train(engine, 0, 2)
        before = everything(engine)
        calls[0], fails_at[0] = 0, at
        with pytest.raises(
            WindowStateError,
            match=r"^a gradient was not added to its sum in host memory \(CUDA error: an illegal memory access was "
            r"encountered\), and the window has changed nothing: run it again\.$",
        ):
            train(engine, 2, 3)
        fails_at[0] = 0
        assert everything(engine) == before
        train(engine, 2, 3)
        assert everything(engine) == expected


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


def test_thread_ends_with_engine():
    engine = make("gradients")
    train(engine, 0, 1)
    stop = sums_of(engine).adder._stop
    assert stop.alive  # type: ignore[attr-defined]
    del engine
    gc.collect()
    assert not stop.alive  # type: ignore[attr-defined]


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
            r'^cuda_graphs=True is not supported with offload="gradients", where the host adds the gradients of each '
            r'micro-batch: leave it out, or pass offload="master"\.$',
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
