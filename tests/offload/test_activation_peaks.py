"""The predicted peak on the device with inputs of layers in host memory, beside the one that a step allocates."""

from typing import Any

import pytest
import torch

from bigbatch.autotune.peak_prediction import PeakPredictor, state_of
from bigbatch.memory.allocation_tracker import AllocationTracker, MemoryCategory
from offload.activations import KINDS, Run, make_samples
from support.tiers import slow, slow_except

CPU = torch.device("cpu")
SHAPES: dict[str, dict[str, Any]] = {
    "wide": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6},
    "deep": {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 12},
}
LENGTHS = [16] * 32


def host_buffers(run: Run) -> list[torch.Tensor]:
    """Return the host memory between two micro-batches."""
    for place in run.layers.inputs._places.values():
        place.reclaim()
    return [buffer for place in run.layers.inputs._places.values() for buffer in place.buffers._free]


def tracked_peak(run: Run) -> int:
    """Return what the second update allocates at its peak, without host memory, which is allocated all the time."""
    samples = make_samples(lengths=2 * LENGTHS)  # the second micro-batch adds to the sums of the first
    run.engine.step(samples)
    buffers = host_buffers(run)
    with AllocationTracker(CPU) as tracker:
        tracker.track([*run.model.parameters(), *run.model.buffers()], MemoryCategory.PARAMETERS)
        tracker.track([*state_of(run.engine.accumulator.optimizer), *buffers], MemoryCategory.OPTIMIZER)
        assert run.engine.step(samples).num_microbatches == 2
    return tracker.peak_bytes - sum(buffer.nbytes for buffer in buffers)


def predicted_peak(run: Run) -> int:
    optimizer = run.engine.accumulator.optimizer
    predictor = PeakPredictor.from_training(run.model, optimizer, run.loss_fn)
    return predictor.predict(run.collate(make_samples(lengths=LENGTHS))).peak_bytes


@pytest.mark.parametrize(
    ("kind", "shape", "settings"),
    [
        *slow_except([(kind, "wide", {}) for kind in KINDS], ("gpt2", "wide", {})),
        *(slow(kind, "wide", {"precision": "bf16"}) for kind in ("llama", "gpt2")),
        slow("llama", "deep", {"lora": True}),
        slow("qwen2", "deep", {"precision": "bf16"}),
    ],
)
def test_peak_is_that_of_an_update(kind: str, shape: str, settings: dict[str, Any]):
    size = SHAPES[shape] if kind != "gpt2" else {"n_layer": SHAPES[shape]["num_hidden_layers"], "n_embd": 32}
    predicted, tracked = {}, {}
    for mode in ("full", "offload"):
        run = Run(mode, kind, shape=size, microbatch=len(LENGTHS), **settings)
        predicted[mode], tracked[mode] = predicted_peak(run), tracked_peak(run)
        assert predicted[mode] == pytest.approx(tracked[mode], rel=0.03)
    assert predicted["offload"] < predicted["full"]
    errors = [predicted[mode] - tracked[mode] for mode in predicted]
    assert errors[0] == pytest.approx(errors[1], abs=0.001 * tracked["full"]), "no error but that of full checkpointing"


def test_prediction_copies_nothing_and_leaves_no_trace():
    run = Run("offload", microbatch=len(LENGTHS))
    predicted_peak(run)
    assert not run.layers.inputs.transfers
    assert not run.layers.inputs.host_bytes
