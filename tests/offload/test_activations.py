"""Inputs of checkpointed layers in host memory: the bits of full checkpointing, less memory, and nothing lost."""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bigbatch.errors import MemoryLimitError
from bigbatch.memory.allocation_tracker import AllocationTracker, MemoryCategory
from bigbatch.offload import host_buffers
from bigbatch.offload.host_buffers import HostBuffers
from bigbatch.offload.layer_inputs import MAX_LEAVING, LayerInputs
from bigbatch.offload.transfers import Transfers
from offload.activations import DEPTH, KINDS, LONGEST, WIDTH, Run, make_samples
from offload.test_failures import Link, broken
from support.tiers import slow, slow_except

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch hides it
CPU = torch.device("cpu")
LEAVING = DEPTH - 1  # all but the input of the last layer
MICROBATCHES = 3  # of `LENGTHS`


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Link:
    return Link(monkeypatch)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Cyclic garbage would keep inputs until some later time."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def host_bytes(run: Run) -> int:
    """Return the bytes of the inputs of the largest micro-batch."""
    return LEAVING * run.collate(make_samples(lengths=[32]))["input_ids"].numel() * WIDTH * 4


def full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


# the same result ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("lora", [False, slow(True)], ids=["all weights", "adapters"])
def test_ragged_packed_rows_have_equal_bits(kind: str, precision: str, lora: bool):
    expected, offloaded = (Run(mode, kind, precision=precision, lora=lora) for mode in ("full", "offload"))
    assert offloaded.results(0, 3) == expected.results(0, 3)
    assert offloaded.counts.num_to_host == offloaded.counts.num_to_device == 3 * MICROBATCHES * LEAVING


@pytest.mark.parametrize("kind", KINDS)
def test_padded_rows_with_masks_have_equal_bits(kind: str):
    settings: dict[str, Any] = {"layout": "padded", "needs_mask": True}
    expected, offloaded = (Run(mode, kind, **settings) for mode in ("full", "offload"))
    assert offloaded.results(0, 2) == expected.results(0, 2)


@pytest.mark.parametrize("level", [slow("optimizer"), slow("master"), "gradients"])
def test_levels_of_offload_have_equal_bits(level: str):
    found = [Run(mode, precision="bf16", offload=level).results(0, 3) for mode in ("full", "offload")]
    assert found[0] == found[1]


def test_fused_gradients_have_equal_bits():
    found = []
    for mode in ("full", "offload"):
        run = Run(mode, precision="bf16", fuse_gradients=True)
        found.append(run.results(0, 3))
        assert run.engine.fused.num_layers > 7 * DEPTH
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", [slow("llama"), "gpt2"])
def test_compiled_layers_have_equal_bits(kind: str):
    found = []
    for mode in ("full", "offload"):
        torch._dynamo.reset()
        run = Run(mode, kind, layout="padded")
        run.layers.compile("eager")
        found.append(run.results(0, 2))
        assert run.layers.is_compiled
    assert found[0] == found[1]
    assert run.counts.num_to_host == 2 * LEAVING * run.engine.step(make_samples()).num_microbatches
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_is_reproduced(compiled: bool):
    found = []
    for mode in ("none", "full", "offload"):
        run = Run(mode, "gpt2", shape={"resid_pdrop": 0.5}, layout="padded")
        if compiled:
            run.layers.compile("eager")
        torch.manual_seed(3)
        found.append(run.gradient(run.collate(make_samples())))
    torch._dynamo.reset()
    assert all(torch.equal(*pair) for pair in zip(found[1], found[2], strict=True))
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(found[0], found[2], strict=True))


def test_two_forwards_of_one_graph_have_equal_bits():
    found = []
    for mode in ("full", "offload"):
        run = Run(mode)
        first, second = (run.collate(make_samples(number)) for number in (0, 1))
        loss = run.loss_fn(run.model, first)[0] * run.loss_fn(run.model, second)[0]
        found.append(torch.autograd.grad(loss, list(run.model.parameters())))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert run.counts.num_to_device == 2 * LEAVING


def test_second_backward_copies_again():
    run = Run("offload")
    loss, _ = run.loss_fn(run.model, run.collate(make_samples()))
    parameters = list(run.model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert run.counts.num_to_device == 2 * LEAVING
    assert run.counts.num_to_host == LEAVING


def test_frozen_first_layers_keep_nothing():
    """Nothing is saved for a layer without gradient; its input is dropped with the forward of the layer."""
    found = []
    for mode in ("full", "offload"):
        run = Run(mode)
        run.model.requires_grad_(False)
        for layer in run.model.model.layers[2:]:
            layer.requires_grad_(True)
        found.append(run.gradient(run.collate(make_samples())))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert run.counts.num_to_device == LEAVING - 2


def test_graph_of_other_forward_may_end_first():
    found = []
    for mode in ("full", "offload"):
        run = Run(mode)
        parameters = list(run.model.parameters())
        losses = [run.loss_fn(run.model, run.collate(make_samples(number)))[0] for number in (0, 1)]
        found.append([torch.autograd.grad(loss, parameters) for loss in losses])
    assert all(torch.equal(a, b) for pair in zip(*found, strict=True) for a, b in zip(*pair, strict=True))


# what is copied ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_all_but_last_layer_are_copied(kind: str):
    """No masks, positions or offsets."""
    run = Run("offload", kind)
    microbatch = run.collate(make_samples())
    run.gradient(microbatch)
    num_bytes = LEAVING * microbatch["input_ids"].numel() * WIDTH * 4
    assert run.counts.bytes_to_host == run.counts.bytes_to_device == num_bytes
    assert run.layers.inputs.host_bytes == num_bytes


def test_evaluation_copies_nothing():
    run = Run("offload")
    with torch.no_grad():
        run.loss_fn(run.model, run.collate(make_samples()))
    assert not run.layers.inputs.transfers


def test_input_is_fetched_one_layer_ahead(monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    for name in ("_copy_to_device", "_copy_to_host"):
        original = getattr(Transfers, name)

        def noting(self: Transfers, *words: Any, name: str = name, original: Any = original) -> Any:
            events.append(name[6:])
            return original(self, *words)

        monkeypatch.setattr(Transfers, name, noting)
    run = Run("offload")
    for index, layer in enumerate(run.model.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, index=index: events.append(f"layer {index}"))
    run.gradient(run.collate(make_samples()))
    forward = [event for index in range(LEAVING) for event in ("to_host", f"layer {index}")]
    backward = [event for index in range(LEAVING - 1, -1, -1) for event in ("to_device", f"layer {index + 1}")]
    assert events == [*forward, f"layer {LEAVING}", *backward, "layer 0"]


def test_input_that_is_not_contiguous_stays_on_device():
    inputs, weight = LayerInputs(), torch.randn(6, 4, requires_grad=True)
    for columns, expected in ((weight.t(), 0), (weight, 1)):
        inputs.run(_checkpoint, True, torch.sin, columns).sum().backward()
        assert inputs.transfers[0].counts.num_to_host == expected
    assert weight.grad is not None
    assert torch.allclose(weight.grad, 2 * weight.cos())


def _checkpoint(*words: Any, **settings: Any) -> Any:
    return checkpoint(*words, use_reentrant=False, **settings)


def test_layer_without_positional_input_is_refused():
    with pytest.raises(
        RuntimeError,
        match=r"^a layer is called without its input as the first positional argument, which checkpointing with "
        r"offload copies to the host: use full activation checkpointing\.$",
    ):
        LayerInputs().run(_checkpoint, True, torch.sin, input=torch.ones(2))


@pytest.mark.parametrize("leaves", [False, True])
def test_input_that_is_written_to_is_refused(leaves: bool):
    inputs = LayerInputs()
    hidden = torch.randn(4, 4, requires_grad=True) * 2
    loss = inputs.run(_checkpoint, leaves, torch.sin, hidden).sum()
    hidden.add_(1)
    with pytest.raises(RuntimeError, match=r"^the input of a checkpointed layer was modified by an inplace operation"):
        loss.backward()


def test_write_is_noticed_in_forward_and_costs_no_memory():
    run = Run("offload")
    microbatch = run.collate(make_samples())
    expected = run.gradient(microbatch)
    before = run.layers.inputs.host_bytes

    def write(_: Any, inputs: tuple[Tensor, ...], __: Any) -> None:
        with torch.no_grad():
            inputs[0].add_(1)

    handle = run.model.model.layers[1].register_forward_hook(write)
    with pytest.raises(RuntimeError, match=r"^the input of a checkpointed layer was modified by an inplace operation"):
        run.loss_fn(run.model, microbatch)
    handle.remove()
    assert all(torch.equal(*pair) for pair in zip(run.gradient(microbatch), expected, strict=True))
    assert run.layers.inputs.host_bytes == before


# memory ------------------------------------------------------------------------------------------------------------


def card_peak(run: Run, microbatch: dict[str, Tensor]) -> int:
    """Return the peak of what is not in host memory, which the tracker counts as memory of the CPU all the time."""
    run.gradient(microbatch)  # allocates the host memory
    places = run.layers.inputs._places.values()
    buffers = [buffer for place in places for buffer in place.buffers._free + [e.buffer for e in place.dropped]]
    found = [buffer for buffer in buffers if buffer is not None]
    assert sum(buffer.nbytes for buffer in found) == run.layers.inputs.host_bytes
    with AllocationTracker(CPU) as tracker:
        tracker.track(run.model.parameters(), MemoryCategory.PARAMETERS)
        tracker.track(found, MemoryCategory.OPTIMIZER)
        run.gradient(microbatch)
    return tracker.peak_bytes - run.layers.inputs.host_bytes


@pytest.mark.parametrize("depth", [4, 8])
def test_peak_is_lower_by_inputs_that_are_not_in_flight(depth: int):
    """At the peak, in backward of the last layer, its input and the one before it are on the device.

    Little is trained: all gradients exist in backward of the first layer.
    """
    lengths = [16] * 24
    peaks = {}
    for mode in ("full", "offload"):
        shape = {"num_hidden_layers": depth, "hidden_size": 64, "intermediate_size": 256}
        run = Run(mode, shape=shape)
        run.model.requires_grad_(False)
        run.model.model.layers[0].input_layernorm.requires_grad_(True)
        microbatch = run.collate(make_samples(lengths=lengths))
        peaks[mode] = card_peak(run, microbatch)
    num_bytes = microbatch["input_ids"].numel() * 64 * 4
    assert peaks["full"] - peaks["offload"] == (depth - 2) * num_bytes


def test_two_inputs_are_on_device_within_a_pass():
    """Forward keeps that of the running layer and the one before it; backward, that of the next layer as well."""
    held: list[int] = []
    run = Run("offload")
    microbatch = run.collate(make_samples())
    shape = (*microbatch["input_ids"].shape, WIDTH)

    def count(_: Any, __: Any) -> None:
        inputs = run.layers.inputs._places[CPU, False]._inputs
        tensors = [each.on_device for each in inputs if each.on_device is not None]
        assert all(tensor.shape == shape for tensor in tensors)
        held.append(len(tensors))

    for layer in run.model.model.layers:
        layer.self_attn.register_forward_pre_hook(count)
    run.gradient(microbatch)
    in_forward, in_backward = held[:DEPTH], held[DEPTH:]
    assert in_forward == [1, *[MAX_LEAVING] * (DEPTH - 2), 0], "all have left before the last layer runs"
    assert in_backward == [*[1] * (DEPTH - 1), 0], "the next one is on its way; that in use belongs to the graph"


def test_host_memory_does_not_grow_over_microbatches():
    run = Run("offload")
    with no_garbage_collection():
        sizes = [30, 16, 9, 31, 4, 22, 1]
        run.gradient(run.collate(make_samples(lengths=[16] * 2 + [8])))
        expected = run.layers.inputs.host_bytes
        for number in range(50):
            run.gradient(run.collate(make_samples(number, lengths=[1 + sizes[number % 7] % LONGEST])))
            assert run.layers.inputs.host_bytes == expected


def test_growing_microbatches_replace_buffers():
    run = Run("offload")
    with no_garbage_collection():
        for num_samples in (1, 2, 4):
            microbatch = run.collate(make_samples(lengths=[16] * num_samples))
            run.gradient(microbatch)
            run.gradient(microbatch)
            assert run.layers.inputs.host_bytes == LEAVING * microbatch["input_ids"].numel() * WIDTH * 4


def test_smallest_buffer_that_is_large_enough_is_used():
    buffers = HostBuffers(Transfers(CPU))
    made = [buffers.take(num_bytes) for num_bytes in (30, 10, 20)]
    for buffer in made:
        buffers.put(buffer)
    assert [buffers.take(num_bytes).nbytes for num_bytes in (15, 1, 25)] == [20, 10, 30]
    assert buffers.num_bytes == 60


def test_graph_that_is_dropped_frees_its_memory():
    run = Run("offload")
    microbatch = run.collate(make_samples())
    expected = run.gradient(microbatch)
    before = run.layers.inputs.host_bytes
    with no_garbage_collection():
        for _ in range(3):
            loss, _ = run.loss_fn(run.model, microbatch)
            del loss
        found = run.gradient(microbatch)
    assert run.layers.inputs.host_bytes == before
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_other_mode_frees_host_memory():
    run = Run("offload")
    run.gradient(run.collate(make_samples()))
    assert run.layers.inputs.host_bytes
    run.layers.set_checkpointing("full")
    assert not run.layers.inputs.host_bytes


def test_copied_model_has_memory_of_its_own():
    run = Run("offload")
    microbatch = run.collate(make_samples())
    expected = run.gradient(microbatch)
    counts = copy.copy(run.counts)
    copied = copy.deepcopy(run.model)
    loss, _ = run.loss_fn(copied, microbatch)
    found = torch.autograd.grad(loss, list(copied.parameters()))
    assert run.counts == counts
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    inputs = {id(layer._gradient_checkpointing_func.func.__self__) for layer in copied.model.layers}
    assert len(inputs) == 1


# failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_failure_at_any_transfer_loses_nothing(link: Link):
    expected = Run("offload").results(0, 3)
    num_transfers = 2 * LEAVING * MICROBATCHES
    for at in range(1, num_transfers + 1):
        run = Run("offload")
        run.step(0)
        before = run.weights()
        link.arm(at, broken)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            run.step(1)
        link.arm(0, broken)
        assert run.weights() == before
        assert run.results(1, 3) == expected[1:]
        assert run.layers.inputs.host_bytes == host_bytes(run)
    assert link.num == 2 * num_transfers


@pytest.mark.slow
def test_memory_that_runs_out_at_any_transfer_counts_samples_once(link: Link):
    """As in full checkpointing, where memory runs out in the same micro-batch."""
    expected = [_out_of_memory_once(2 * number + 1) for number in range(MICROBATCHES)]
    for at in range(2 * LEAVING * MICROBATCHES):
        run = Run("offload")
        run.step(0)
        link.arm(at + 1, full)
        report = run.step(1)
        link.arm(0, full)
        assert report.retries == 1
        assert [float(report.loss), *run.results(2, 3)] == expected[at // (2 * LEAVING)]
        assert run.layers.inputs.host_bytes == host_bytes(run)


def _out_of_memory_once(at: int) -> list[Any]:
    """Train with full checkpointing; in the second window, memory runs out at a call of the first layer."""
    run, calls = Run("full"), [0]
    run.step(0)

    def failing(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == at:
            full()

    run.model.model.layers[0].mlp.register_forward_pre_hook(failing)
    report = run.step(1)
    assert report.retries == 1
    return [float(report.loss), *run.results(2, 3)]


@pytest.mark.parametrize("at", slow_except(range(1, 2 * MICROBATCHES + 1), 1, MICROBATCHES + 1))
def test_microbatch_that_does_not_fit_is_halved(at: int):
    found = []
    for mode in ("full", "offload"):
        calls: list[int] = []

        def failing(*_: Any, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) in (at, at + 1):
                full()

        run = Run(mode)
        run.step(0)
        run.model.model.layers[DEPTH // 2].mlp.register_forward_pre_hook(failing)
        report = run.step(1)
        found.append((report.retries, float(report.loss), report.grad_norm, run.results(2, 4)))
        assert report.retries
    assert found[0] == found[1]


def test_window_with_infinite_gradient_changes_nothing():
    expected, run = Run("full"), Run("offload")
    expected.results(0, 2)
    run.results(0, 2)
    before = run.weights()
    handle = run.model.model.norm.weight.register_hook(lambda gradient: gradient * torch.inf)
    assert run.step(2).skipped == "non-finite gradient"
    handle.remove()
    assert run.weights() == before
    assert run.results(2, 4) == expected.results(2, 4)


def test_loss_that_raises_changes_nothing():
    expected, calls = Run("offload").results(0, 2), [0]
    run = Run("offload")

    def failing(model: Any, microbatch: dict[str, Tensor]) -> Any:
        result = loss_fn(model, microbatch)
        calls[0] += 1
        if calls[0] == MICROBATCHES + 2:
            raise ZeroDivisionError("of the user")
        return result

    loss_fn = run.loss_fn
    run = Run("offload", loss_fn=failing)
    run.step(0)
    with pytest.raises(ZeroDivisionError):
        run.step(1)
    assert run.results(1, 2) == expected[1:]


def test_host_memory_that_is_missing_halves_microbatches(monkeypatch: pytest.MonkeyPatch):
    """Three of the four inputs of a micro-batch of 32 tokens fit, those of its halves do."""
    found = []
    for limit in (10**9, 3 * 32 * WIDTH * 4):
        run = Run("offload", microbatch=2, layout="padded")
        monkeypatch.setattr(
            host_buffers, "available_host_bytes", lambda run=run, limit=limit: limit - run.layers.inputs.host_bytes
        )
        samples = make_samples(lengths=[16] * 4)
        report = run.engine.step(samples)
        found.append(float(report.loss))
        assert bool(report.retries) == (limit < 10**9)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_host_without_memory_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host_buffers, "available_host_bytes", lambda: 100)
    run = Run("offload", microbatch=2, layout="padded")
    with pytest.raises(
        MemoryLimitError,
        match=r"does not fit in memory by itself \(out of host memory for inputs of layers: 1\.0 KiB are needed, and "
        r"100 B are available\)",
    ):
        run.engine.step(make_samples(lengths=[16] * 4))


def test_memory_that_cannot_be_pinned_counts_as_missing(monkeypatch: pytest.MonkeyPatch):
    def unpinnable(_: Transfers, num_bytes: int) -> Tensor:
        raise MemoryLimitError("cudaHostRegister returned 2")

    monkeypatch.setattr(Transfers, "host_memory", unpinnable)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"^out of host memory for inputs of layers: cudaHostRegister returned 2$"
    ):
        Run("offload").gradient({"input_ids": torch.ones(1, 4, dtype=torch.int64), "labels": torch.ones(1, 4).long()})
