"""Offload on a CUDA device: the same bits, pinned memory, a bound on the peak, and copies beside the computation."""

import contextlib
import gc
from typing import Any

import pytest
import torch
from torch import nn

from bigbatch.offload import host_adder, streamed_optimizer
from bigbatch.offload.transfers import CudaTransfers
from offload.models import (
    OPTIMIZERS,
    Decoder,
    decoder_loss,
    make_batch,
    make_engine,
    make_model,
    make_tokens,
    plain_state,
    streamed_of,
    values,
)

pytestmark = pytest.mark.gpu
MIB = 2**20
PRODUCTS = ("gemm", "nvjet", "cutlass")  # in the names of kernels of matrix products
CUDA = {**OPTIMIZERS, "adamw-capturable": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True)}


@pytest.mark.parametrize("name", CUDA)
def test_twenty_updates_have_equal_bits(name: str):
    found = []
    for level in ("none", "optimizer"):
        model = make_model(device="cuda")
        engine = make_engine(model, CUDA[name](list(model.parameters())), level)
        reports = [engine.step(make_batch(number)) for number in range(20)]
        states = [plain_state(optimizer) for optimizer in engine.accumulator.update.optimizers]
        found.append((values(model).tolist(), states, [report.grad_norm for report in reports]))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "sgd", "adamw-capturable", "nadam"])
def test_resumed_run_has_equal_bits(name: str):
    def make(level: str, seed: int) -> Any:
        model = make_model(seed, device="cuda")
        return make_engine(model, CUDA[name](list(model.parameters())), level)

    expected, before, after = make("none", 1), make("optimizer", 1), make("optimizer", 2)
    for number in range(6):
        expected.step(make_batch(number))
    for number in range(3):
        before.step(make_batch(number))
    after.load_state_dict(before.state_dict())
    for number in range(3, 6):
        after.step(make_batch(number))
    assert torch.equal(values(after.model), values(expected.model))


def is_registered(address: int, num_bytes: int) -> bool:
    """Return whether host memory is registered. In torch 2.11, `Tensor.is_pinned` returns False for such memory."""
    runtime: Any = torch.cuda.cudart()
    if int(runtime.cudaHostUnregister(address)):
        with contextlib.suppress(RuntimeError):  # the next launch reports the error of the call above
            torch.zeros(1, device="cuda").add_(1)
        return False
    assert int(runtime.cudaHostRegister(address, num_bytes, 0)) == 0
    return True


def is_in_pinned_memory(tensor: torch.Tensor, engine: Any) -> bool:
    for chunk in streamed_of(engine).chunks:
        start = chunk.host.data_ptr()
        if start <= tensor.data_ptr() < start + chunk.host.nbytes:
            return is_registered(start, chunk.host.nbytes)
    return False


def test_state_is_in_pinned_host_memory():
    model = make_model(device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine = make_engine(model, optimizer)
    engine.step(make_batch(0))
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert all(tensor.device.type == "cpu" and is_in_pinned_memory(tensor, engine) for tensor in moments)


def test_memory_is_pinned_until_no_tensor_in_it_is_left():
    memory = CudaTransfers(torch.device("cuda", 0)).host_memory(3 * MIB + 1)
    address, num_bytes = memory.data_ptr(), memory.nbytes
    part = memory[5:]
    del memory
    gc.collect()
    assert is_registered(address, num_bytes)
    del part
    gc.collect()
    assert not is_registered(address, num_bytes)


def test_state_dict_does_not_allocate_on_device():
    model = make_model(device="cuda")
    engine = make_engine(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    engine.step(make_batch(0))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    state = engine.state_dict()["optimizer"]["state"]
    assert torch.cuda.max_memory_allocated() == before
    assert all(entry["exp_avg"].device.type == "cpu" for entry in state.values())


def large_engine(level: str) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(48)]).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        return model(batch).square().sum(), len(batch)

    return make_engine(model, optimizer, level, microbatch=8, loss_fn=loss_fn, noise=False, max_grad_norm=1.0)


def test_peak_of_training_is_without_state(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streamed_optimizer, "CHUNK_BYTES", 64 * MIB)
    peaks, base = {}, torch.cuda.memory_allocated()
    batch = torch.randn(16, 2048)
    for level in ("none", "optimizer"):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        engine = large_engine(level)
        for _ in range(3):
            engine.step(batch)
        peaks[level] = torch.cuda.max_memory_allocated() - base
        weights = sum(parameter.nbytes for parameter in engine.model.parameters())
        del engine
    assert peaks["none"] > 4 * weights
    assert peaks["optimizer"] < 2 * weights + 3 * 64 * MIB + 96 * MIB


def test_copies_run_beside_the_computation(monkeypatch: pytest.MonkeyPatch):
    """Both directions and the kernels overlap: fewer time than the copies would need one after the other."""
    monkeypatch.setattr(streamed_optimizer, "CHUNK_BYTES", 64 * MIB)
    engine = large_engine("optimizer")
    engine.step(torch.randn(16, 2048))
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        engine.step(torch.randn(16, 2048))
        torch.cuda.synchronize()
    spans: dict[str, list[tuple[float, float]]] = {"HtoD": [], "DtoH": []}
    for event in profile.events():
        for direction, found in spans.items():
            if direction in event.name and event.time_range.elapsed_us() > 100:
                found.append((event.time_range.start, event.time_range.end))
    num_chunks = len(streamed_of(engine).chunks)
    assert num_chunks >= 24
    assert len(spans["HtoD"]) >= num_chunks
    assert len(spans["DtoH"]) >= num_chunks
    both = sum(
        max(0.0, min(end, other_end) - max(start, other_start))
        for start, end in spans["HtoD"]
        for other_start, other_end in spans["DtoH"]
    )
    shorter = min(sum(end - start for start, end in found) for found in spans.values())
    assert both > 0.5 * shorter


@pytest.mark.parametrize("name", CUDA)
def test_master_weights_have_equal_bits(name: str):
    found = []
    for level in ("none", "master"):
        torch.manual_seed(0)
        model = Decoder().cuda()
        engine = make_engine(model, CUDA[name](list(model.parameters())), level, loss_fn=decoder_loss)
        reports = [engine.step(make_tokens(number)) for number in range(20)]
        state = {name: tensor.tolist() for name, tensor in engine.state_dict()["model"].items()}
        found.append((state, [report.grad_norm for report in reports]))
    assert found[0] == found[1]
    assert model.first.weight.dtype is torch.bfloat16


def test_master_weights_are_saved_and_loaded():
    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        model = Decoder().cuda()
        return make_engine(model, CUDA["adamw-fused"](list(model.parameters())), "master", loss_fn=decoder_loss)

    first, second = make(0), make(1)
    for number in range(3):
        first.step(make_tokens(number))
    second.step(make_tokens(0))
    second.load_state_dict(first.state_dict())
    for engine in (first, second):
        engine.step(make_tokens(3))
    one, other = (engine.state_dict()["model"] for engine in (first, second))
    assert all(torch.equal(one[name].cpu(), other[name].cpu()) for name in one)
    with first.whole_weights():
        assert first.model.first.weight.dtype is torch.float32
        assert is_in_pinned_memory(first.model.first.weight, first)
    assert first.model.first.weight.is_cuda


def test_peak_of_training_is_without_master_weights(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streamed_optimizer, "CHUNK_BYTES", 64 * MIB)
    torch.manual_seed(0)
    gc.collect()
    others = torch.cuda.memory_allocated()  # of other tests in this process
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(48)]).cuda()
    weights = sum(parameter.nbytes for parameter in model.parameters())

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return model(batch).float().square().sum(), len(batch)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine = make_engine(model, optimizer, "master", microbatch=8, loss_fn=loss_fn, noise=False, max_grad_norm=1.0)
    engine.step(torch.randn(16, 2048))
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() - others < 0.5 * weights + 96 * MIB  # the weights in bfloat16
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        engine.step(torch.randn(16, 2048))
    assert torch.cuda.max_memory_allocated() - others < 1.5 * weights + 3 * 96 * MIB + 128 * MIB


@pytest.mark.parametrize("name", CUDA)
def test_gradient_sums_have_equal_bits(name: str):
    """Without clipping, whose norm the host computes."""
    found, norms = [], []
    for level in ("none", "gradients"):
        torch.manual_seed(0)
        model = Decoder().cuda()
        settings = {"loss_fn": decoder_loss, "max_grad_norm": None}
        engine = make_engine(model, CUDA[name](list(model.parameters())), level, **settings)
        reports = [engine.step(make_tokens(number)) for number in range(20)]
        found.append({name: tensor.tolist() for name, tensor in engine.state_dict()["model"].items()})
        norms.append([report.grad_norm for report in reports])
    assert found[0] == found[1]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert model.first.weight.dtype is torch.bfloat16


def test_clipped_gradient_sums_have_close_weights():
    found = []
    for level in ("none", "gradients"):
        torch.manual_seed(0)
        model = make_model(device="cuda")
        engine = make_engine(model, CUDA["adamw-fused"](list(model.parameters())), level)
        for number in range(20):
            engine.step(make_batch(number))
        found.append(values(engine.model))
    assert (found[0] - found[1]).norm() <= 1e-6 * found[0].norm()


def decoder_stack(level: str, microbatch: int = 8) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(48)]).cuda()

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return model(batch).float().square().sum(), len(batch)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return make_engine(model, optimizer, level, microbatch=microbatch, loss_fn=loss_fn, noise=False, max_grad_norm=1.0)


def test_peak_of_training_is_without_gradient_sums(monkeypatch: pytest.MonkeyPatch):
    """The weights in bfloat16, 24 MiB of gradients on their way, and three slots of a chunk with its sums."""
    monkeypatch.setattr(streamed_optimizer, "CHUNK_BYTES", 64 * MIB)
    monkeypatch.setattr(host_adder, "STAGING_BYTES", 24 * MIB)
    gc.collect()
    base = torch.cuda.memory_allocated()
    engine = decoder_stack("gradients")
    weights = sum(parameter.nbytes for parameter in engine.model.parameters())
    engine.step(torch.randn(16, 2048))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        engine.step(torch.randn(16, 2048))
    assert torch.cuda.max_memory_allocated() - base < 0.5 * weights + 4 * 128 * MIB
    sums = streamed_of(engine).chunks[0].sums
    assert sums is not None
    assert sums.host.is_pinned()


def test_memory_that_runs_out_in_backward_counts_samples_once(monkeypatch: pytest.MonkeyPatch):
    """With staging memory that holds whole gradients: one that was copied in part ends the window."""
    monkeypatch.setattr(streamed_optimizer, "CHUNK_BYTES", 64 * MIB)
    monkeypatch.setattr(host_adder, "STAGING_BYTES", 192 * MIB)
    found = []
    for level in ("none", "gradients"):
        engine, calls = decoder_stack(level), [0]
        engine.step(torch.ones(16, 2048))
        original = CudaTransfers.to_host

        def failing(self: CudaTransfers, *arguments: Any, calls: list[int] = calls, original: Any = original) -> Any:
            calls[0] += 1
            if calls[0] == 30:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return original(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(CudaTransfers, "to_host", failing)
            report = engine.step(torch.ones(16, 2048) / 2)
        assert report.retries == (level == "gradients")
        found.append([tensor.tolist() for name, tensor in engine.state_dict()["model"].items() if name[0] == "0"])
    assert torch.tensor(found[0]).sub(torch.tensor(found[1])).abs().max() <= 1e-6


def test_gradients_are_copied_while_backward_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streamed_optimizer, "CHUNK_BYTES", 64 * MIB)
    monkeypatch.setattr(host_adder, "STAGING_BYTES", 1024 * MIB)  # all gradients: copies do not wait for additions
    engine = decoder_stack("gradients", microbatch=32_768)  # the products take longer than their launches
    batch = torch.randn(65_536, 2048)
    engine.step(batch)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        engine.step(batch)
        torch.cuda.synchronize()
    spans: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for event in profile.events():
        is_copy, is_product = "DtoH" in event.name, any(name in event.name.lower() for name in PRODUCTS)
        if (is_copy or is_product) and event.time_range.elapsed_us() > 50:
            spans[is_copy].append((event.time_range.start, event.time_range.end))
    assert spans[False], sorted({event.name for event in profile.events()})
    last = max(end for _, end in spans[False])  # of the products; later copies are those of the update
    copies = [(start, end) for start, end in spans[True] if end < last]
    assert len(copies) >= 90  # 96 gradients of 8 MiB
    beside = sum(max(0.0, min(end, stop) - max(start, begin)) for start, end in copies for begin, stop in spans[False])
    assert beside > 0.5 * sum(end - start for start, end in copies)
