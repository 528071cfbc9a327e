"""Inputs of layers in pinned host memory on CUDA: the same bits, less memory, copies beside the computation."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.setup import set_up_model
from bigbatch.lm.training.engine_factory import make_engine
from bigbatch.offload.transfers import CudaTransfers
from offload.activations import DEPTH, KINDS, Run, make_decoder, make_samples
from offload.test_offload_cuda import is_registered

pytestmark = pytest.mark.gpu
MIB = 2**20
LARGE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "num_attention_heads": 16,
    "vocab_size": 1000, "max_position_embeddings": 2048,
}  # fmt: skip
LARGE_ROW = [2048] * 8


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Backward of attention and of embeddings adds in an order that is the same in every run."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_rows_have_equal_bits(kind: str, precision: str):
    found = []
    for mode in ("full", "offload"):
        run = Run(mode, kind, precision=precision, layout="padded", device="cuda")
        found.append(run.results(0, 10))
    assert found[0] == found[1]
    assert run.counts.num_to_device == run.counts.num_to_host > 10 * (DEPTH - 1)


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("settings", [{"offload": "gradients"}, {"offload": "master"}, {"lora": True}], ids=str)
def test_levels_and_adapters_have_equal_bits(settings: dict[str, Any]):
    found = []
    for mode in ("full", "offload"):
        run = Run(mode, precision="bf16", layout="padded", device="cuda", max_grad_norm=None, **settings)
        found.append(run.results(0, 10)[-1])
    assert found[0] == found[1]


def large_run(mode: str) -> Run:
    """A decoder of 12 layers whose inputs are 128 MiB in float32 each, of which the first norm alone is trained."""
    run = Run(mode, precision="bf16", device="cuda", shape=LARGE, longest=2048)
    run.model.requires_grad_(False)
    run.model.model.layers[0].input_layernorm.requires_grad_(True)
    return run


def on_device(run: Run, lengths: list[int]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in run.collate(make_samples(lengths=lengths)).items()}


def test_large_gradient_is_that_of_full_checkpointing():
    """Not to the bit: attention in packed rows adds in another order in every run."""
    found = []
    for mode in ("full", "full", "offload"):
        run = large_run(mode)
        microbatch = on_device(run, LARGE_ROW)
        found.append([run.gradient(microbatch)[0] for _ in range(3)])
        del run
    first, second, offloaded = (torch.stack(gradients).double() for gradients in found)
    noise = (first - second).norm() / first.norm()
    assert (offloaded - first).norm() / first.norm() <= max(4 * float(noise), 1e-5)


def test_peak_is_lower_by_inputs_that_are_not_in_flight():
    peaks = {}
    for mode in ("full", "offload"):
        gc.collect()
        torch.cuda.empty_cache()
        base = torch.cuda.memory_allocated()
        run = large_run(mode)
        microbatch = on_device(run, LARGE_ROW)
        for _ in range(2):
            run.gradient(microbatch)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run.gradient(microbatch)
        peaks[mode] = torch.cuda.max_memory_allocated() - base
        num_bytes = microbatch["input_ids"].numel() * LARGE["hidden_size"] * 4
        del run
    expected = (LARGE["num_hidden_layers"] - 2) * num_bytes
    saved = peaks["full"] - peaks["offload"]
    assert expected - 16 * MIB <= saved <= expected + num_bytes, "the two peaks need not be at the same layer"


def test_host_memory_is_pinned_and_does_not_grow():
    run = large_run("offload")
    sizes = []
    for lengths in (LARGE_ROW, LARGE_ROW[:3], LARGE_ROW, LARGE_ROW[:5]):
        run.gradient(on_device(run, lengths))
        sizes.append(run.layers.inputs.host_bytes)
    assert len(set(sizes)) == 1
    torch.cuda.synchronize()
    run.layers.inputs.transfers[0].finish()
    (place,) = run.layers.inputs._places.values()
    place.reclaim()
    assert len(place.buffers._free) == LARGE["num_hidden_layers"] - 1
    assert all(is_registered(buffer.data_ptr(), buffer.nbytes) for buffer in place.buffers._free)


def test_copies_run_beside_the_products():
    run = large_run("offload")
    microbatch = on_device(run, LARGE_ROW)
    for _ in range(2):
        run.gradient(microbatch)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        run.gradient(microbatch)
        torch.cuda.synchronize()
    copies: dict[str, list[tuple[float, float]]] = {"HtoD": [], "DtoH": []}
    kernels: list[tuple[float, float]] = []
    for event in profile.events():
        span = event.time_range.start, event.time_range.end
        if not event.name.startswith(("Memcpy", "Memset")):
            kernels.append(span)
        for direction, found in copies.items():
            if direction in event.name and event.time_range.elapsed_us() > 500:
                found.append(span)
    assert len(kernels) >= 7 * LARGE["num_hidden_layers"]
    for found in copies.values():
        assert len(found) == LARGE["num_hidden_layers"] - 1
        beside = sum(max(0.0, min(end, stop) - max(start, begin)) for start, end in found for begin, stop in kernels)
        hidden = min(sum(end - start for start, end in spans) for spans in (found, kernels))
        assert beside > 0.3 * hidden


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.usefixtures("deterministic")
def test_memory_that_runs_out_at_a_copy_counts_samples_once(monkeypatch: pytest.MonkeyPatch):
    found = []
    for name in (None, "_copy_to_host", "_copy_to_device"):
        run = Run("offload", layout="padded", device="cuda", max_grad_norm=None)
        run.step(0)
        with monkeypatch.context() as patch:
            if name is not None:
                calls, original = [0], getattr(CudaTransfers, name)

                def failing(self: Any, *words: Any, calls: list[int] = calls, original: Any = original) -> Any:
                    calls[0] += 1
                    if calls[0] == 3:
                        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                    return original(self, *words)

                patch.setattr(CudaTransfers, name, failing)
            assert run.step(1).retries == (name is not None)
        found.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    assert all(torch.allclose(found[0], other, rtol=1e-5, atol=1e-6) for other in found[1:])


@pytest.mark.filterwarnings("ignore")  # of compilers
@pytest.mark.parametrize("compile_", ["auto", "layers"])
def test_run_is_compiled_and_never_captured(compile_: str):
    config = TrainConfig(model="tiny", max_length=16, gradient_checkpointing="offload", compile=compile_).resolved()
    device_spec = DeviceSpec(torch.device("cuda"), "bf16")
    model_setup = set_up_model(make_decoder(device="cuda"), config, device_spec, pad_id=0, longest=16)
    assert model_setup.layers is not None
    assert model_setup.layers.is_compiled
    assert not model_setup.uses_cuda_graphs
    note = "micro-batches are not captured as CUDA graphs: inputs of layers are copied to the host"
    assert (note in model_setup.notes) == (compile_ == "auto")
    optimizer = torch.optim.AdamW(model_setup.model.parameters(), lr=1e-3)
    engine = make_engine(model_setup, optimizer, microbatch=4)
    losses = [float(engine.step(make_samples()).loss) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert model_setup.layers.inputs.host_bytes


def test_capture_is_refused_and_runs_eagerly():
    run = Run("offload", layout="padded", device="cuda", cuda_graphs=True, microbatch=4)
    for number in range(3):
        run.step(number)
    assert run.engine.runner.disabled_reason == "inputs of layers in host memory are not captured in CUDA graphs"
