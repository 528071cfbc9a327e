"""Offload on a CUDA device: the same bits, pinned memory, a bound on the peak, and copies beside the computation."""

import contextlib
import gc
import mmap
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bigbatch
from bigbatch.errors import MemoryLimitError
from bigbatch.offload import streamed_optimizer, sum_streamer
from bigbatch.offload.link_rate import measure_link_rate
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


def test_memory_that_cannot_be_pinned_leaves_no_error_behind(monkeypatch: pytest.MonkeyPatch):
    """CUDA would report the failure again with the next kernel, which may be one that works."""
    pages = mmap.mmap(-1, MIB)
    monkeypatch.setattr(mmap, "mmap", lambda *_: pages)  # so that the same memory is pinned twice
    transfers = CudaTransfers(torch.device("cuda", 0))
    held = transfers.host_memory(MIB)
    with pytest.raises(MemoryLimitError, match=r"1.0 MiB of host memory .* \(cudaHostRegister returned"):
        transfers.host_memory(MIB)
    assert float((held[:4].cuda() + 1).sum()) == 4


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
    found = []
    for level in ("none", "gradients"):
        torch.manual_seed(0)
        model = Decoder().cuda()
        engine = make_engine(model, CUDA[name](list(model.parameters())), level, loss_fn=decoder_loss)
        reports = [engine.step(make_tokens(number)) for number in range(20)]
        state = {name: tensor.tolist() for name, tensor in engine.state_dict()["model"].items()}
        found.append((state, [report.grad_norm for report in reports]))
    assert found[0] == found[1]
    assert model.first.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradient_sums_without_autocast_have_equal_bits(dtype: torch.dtype):
    found = []
    for level in ("none", "gradients"):
        model = make_model(device="cuda", dtype=dtype)
        engine = make_engine(model, CUDA["adamw-fused"](list(model.parameters())), level)
        reports = [engine.step(make_batch(number, dtype=dtype)) for number in range(20)]
        found.append((values(model).tolist(), [report.grad_norm for report in reports]))
    assert found[0] == found[1]


def test_large_gradient_sums_have_equal_bits(monkeypatch: pytest.MonkeyPatch):
    """Parameters of several parts of a sum, in several slots, and of fewer; with clipping."""
    monkeypatch.setattr(streamed_optimizer, "CHUNK_BYTES", 64 * MIB)
    monkeypatch.setattr(sum_streamer, "SUM_SLOT_BYTES", 4 * MIB)
    batch, found = torch.randn(64, 2048), []
    for level in ("none", "gradients"):
        engine = decoder_stack(level)
        norms = [engine.step(batch).grad_norm for _ in range(3)]
        found.append((norms, {name: tensor.cpu() for name, tensor in engine.state_dict()["model"].items()}))
        del engine
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())


def backward_on(stream: torch.cuda.Stream, window: Any, model: nn.Module, tokens: torch.Tensor) -> None:
    with torch.cuda.stream(stream):
        loss, items = decoder_loss(model, tokens)
        window.backward(loss, items=items)


@pytest.mark.filterwarnings("ignore:.*AccumulateGrad.*stream")  # of torch, if the node is of another stream
def test_gradients_of_other_streams_have_equal_bits():
    """Backwards in threads with streams of their own, one after the other."""
    found = []
    for level in ("none", "gradients"):
        torch.manual_seed(0)
        model = Decoder().cuda()
        accumulator = bigbatch.Accumulator(model, CUDA["adamw"](list(model.parameters())), offload=level)  # type: ignore[arg-type]
        streams = [torch.cuda.Stream() for _ in range(2)]
        for update in range(5):
            window = accumulator.window()
            for number in range(4):
                tokens, stream = make_tokens(4 * update + number).cuda(), streams[number % 2]
                stream.wait_stream(torch.cuda.current_stream())
                thread = threading.Thread(target=backward_on, args=(stream, window, model, tokens))
                thread.start()
                thread.join(60)
                torch.cuda.current_stream().wait_stream(stream)
                streams[1 - number % 2].wait_stream(stream)
            window.step()
        found.append([parameter.tolist() for parameter in model.parameters()])
    assert found[0] == found[1]


def decoder_stack(level: str, microbatch: int = 8) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(48)]).cuda()

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return model(batch).float().square().sum(), len(batch)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return make_engine(model, optimizer, level, microbatch=microbatch, loss_fn=loss_fn, noise=False, max_grad_norm=1.0)


def test_peak_of_training_is_without_gradient_sums(monkeypatch: pytest.MonkeyPatch):
    """The weights in bfloat16, and in the update three slots of a chunk with its sums."""
    monkeypatch.setattr(streamed_optimizer, "CHUNK_BYTES", 64 * MIB)
    monkeypatch.setattr(sum_streamer, "SUM_SLOT_BYTES", 8 * MIB)
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
    assert is_registered(sums.host.data_ptr(), sums.host.nbytes)


def test_memory_that_runs_out_in_backward_counts_samples_once(monkeypatch: pytest.MonkeyPatch):
    """With slots for whole sums: a gradient that was added in part ends the window."""
    monkeypatch.setattr(streamed_optimizer, "CHUNK_BYTES", 64 * MIB)
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
    assert found[0] == found[1]


@pytest.mark.parametrize("slot_bytes", [512, 64 * 1024, 4 * MIB])
def test_streams_wait_for_each_other(slot_bytes: int):
    """Sums of few and many parts, each gradient in memory that the one before has left, and no host that waits."""
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [1, 77, 4096, 1_000_003] if slot_bytes > 512 else [1, 77, 4096, 20_003]
    transfers = CudaTransfers(torch.device("cuda", 0))
    streamer = sum_streamer.SumStreamer(transfers, slot_bytes)
    host = [transfers.host_memory(4 * size).view(torch.float32).fill_(torch.nan) for size in sizes]
    expected = [torch.zeros(size, device="cuda") for size in sizes]
    for number in range(12):
        torch.cuda._sleep(2_000_000)  # gradients are late, and the host is ahead
        for total, reference in zip(host, expected, strict=True):
            gradient = torch.randn(len(total), generator=generator, device="cuda").bfloat16()
            if number:
                reference.add_(gradient)
            else:
                reference.copy_(gradient)
            streamer.add(total, gradient, replaces=not number)
            del gradient
    streamer.wait()
    for total, reference in zip(host, expected, strict=True):
        assert torch.equal(total, reference.cpu())


Spans = list[tuple[float, float]]


def spans_of(run: Callable[[], object]) -> dict[str, Spans]:
    """Return the start and end of the long copies in each direction, and of products, that a function runs."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        run()
        torch.cuda.synchronize()
    spans: dict[str, Spans] = {"HtoD": [], "DtoH": [], "product": []}
    for event in profile.events():
        is_product = any(name in event.name.lower() for name in PRODUCTS)
        for kind, found in spans.items():
            if (kind in event.name or (kind == "product" and is_product)) and event.time_range.elapsed_us() > 50:
                found.append((event.time_range.start, event.time_range.end))
    return spans


def shared(some: Spans, others: Spans) -> float:
    """Return the time in which one of each is in progress."""
    return sum(max(0.0, min(end, stop) - max(start, begin)) for start, end in some for begin, stop in others)


def test_sums_are_copied_while_backward_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streamed_optimizer, "CHUNK_BYTES", 64 * MIB)
    engine = decoder_stack("gradients", microbatch=32_768)  # the products take longer than their launches
    batch = torch.randn(3 * 32_768, 2048, device="cuda")
    engine.step(batch)
    spans = spans_of(lambda: engine.step(batch))
    last = max(end for _, end in spans["product"])  # later copies are those of the update
    to_host, to_card = ([span for span in spans[kind] if span[1] < last] for kind in ("DtoH", "HtoD"))
    assert len(to_host) >= 3 * 48 - 6  # gradients, with sums of 16 MiB
    assert len(to_card) >= 2 * 48
    for copies in (to_host, to_card):
        assert shared(copies, spans["product"]) > 0.5 * sum(end - start for start, end in copies)


def test_sums_move_in_both_directions_at_once():
    transfers = CudaTransfers(torch.device("cuda", 0))
    streamer = sum_streamer.SumStreamer(transfers)
    totals = [transfers.host_memory(16 * MIB).view(torch.float32).zero_() for _ in range(48)]
    gradient = torch.ones(4 * MIB, device="cuda")

    def run() -> None:
        for _ in range(2):
            for total in totals:
                streamer.add(total, gradient, replaces=False)
        streamer.wait()

    run()
    spans = spans_of(run)
    assert len(spans["HtoD"]) == len(spans["DtoH"]) == 2 * 48
    assert shared(spans["HtoD"], spans["DtoH"]) > 0.6 * sum(end - start for start, end in spans["HtoD"])
    assert all(torch.equal(total, torch.full_like(total, 4.0)) for total in totals)


def test_measured_link_is_that_of_pinned_memory():
    """A link of PCIe 3 to 6 over 16 lanes, or NVLink-C2C; pageable memory is slower."""
    before = torch.cuda.memory_allocated()
    rate = measure_link_rate(torch.device("cuda", 0))
    assert rate is not None
    assert 5e9 < rate < 500e9
    assert torch.cuda.memory_allocated() == before
