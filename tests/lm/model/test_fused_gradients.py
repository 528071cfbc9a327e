"""A language model whose layers add to the sums by themselves: the embedding and the head share a weight."""

from typing import Any

import pytest
import torch
from torch import Tensor

import bigbatch
from bigbatch.gradients import direct_sums, weight_products
from bigbatch.lm.bench.workload import W_SMALL
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.dataset import collate
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.chunked_loss import ChunkedCausalLMLoss
from bigbatch.lm.model.decoder_layers import DecoderLayers
from bigbatch.lm.model.setup import set_up_model

pytestmark = [  # of torch's compiler, which hides both unless warnings are errors
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}


def gradient(fuse_gradients: bool, microbatch: int, *, level: Any = "none", backend: str | None = None) -> Any:
    """Return the gradient of 7 ragged sequences in float64, the engine, and its retries."""
    model = W_SMALL.make_model("cpu", dtype=torch.float64, **SIZES)
    layers = DecoderLayers(model)
    if backend is not None:
        layers.compile(backend)
    layers.set_checkpointing(level)
    generator = torch.Generator().manual_seed(3)
    samples: list[dict[str, Tensor]] = []
    for length in (9, 4, 12, 7, 5, 3, 8):
        ids = torch.randint(40, (length,), generator=generator)
        samples.append({"input_ids": ids, "labels": torch.where(ids % 5 == 0, -100, ids)})
    engine = bigbatch.Engine(
        model,
        None,
        ChunkedCausalLMLoss(DeviceSpec(torch.device("cpu"), "float64"), chunk_tokens=8),
        microbatch=microbatch,
        collate=lambda rows: collate(rows, pad_id=0),
        fuse_gradients=fuse_gradients,
        noise=False,
        check=False,
    )
    report = engine.backward(samples)
    return {name: parameter.grad for name, parameter in model.named_parameters()}, engine, report.retries


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    total = sum((found[name] - expected[name]).square().sum() for name in found)
    return (total / sum(tensor.square().sum() for tensor in expected.values())).sqrt().item()


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return gradient(False, 7)[0]


@pytest.mark.parametrize("microbatch", [1, 2, 3, 7])
@pytest.mark.parametrize("level", ["none", "selective", "full"])
def test_fused_model_gives_full_gradient(expected: dict[str, Tensor], microbatch: int, level: str) -> None:
    found, engine, _ = gradient(True, microbatch, level=level)
    assert error(found, expected) <= 1e-12
    assert engine.fused.reasons == {}
    assert engine.fused.num_layers == 2 * 7 + 2


@pytest.mark.slow
def test_fused_compiled_layers_give_full_gradient(expected: dict[str, Tensor]) -> None:
    torch._dynamo.reset()
    for level in ("none", "full"):  # they share their graphs
        assert error(gradient(True, 2, level=level, backend="aot_eager")[0], expected) <= 1e-12


def test_tied_weight_counts_once_after_out_of_memory(
    expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = weight_products.add_rows_
    calls: list[int] = []

    def fail_in_turn(*operands: Tensor) -> None:
        if calls.pop(0) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        original(*operands)

    monkeypatch.setattr(direct_sums, "add_rows_", fail_in_turn)
    for number in (1, 2, 3):
        calls[:] = range(1 - number, 10)
        found, _, retries = gradient(True, 3)
        assert retries == 1
        assert error(found, expected) <= 1e-12


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
def test_packed_rows_in_graphs_give_the_same_gradient() -> None:
    """As `bigbatch train` sets a model up on CUDA: packed, compiled, chunked, captured, under bf16 autocast."""
    torch._dynamo.reset()
    model = W_SMALL.make_model("cuda", vocab_size=20_000)
    batch = [{"input_ids": ids, "labels": ids} for ids in W_SMALL.make_sequences(vocabulary=20_000)]
    config = TrainConfig(model="w-small", max_length=W_SMALL.longest).resolved()
    spec = DeviceSpec(torch.device("cuda", 0), "bf16")
    run = set_up_model(model, config, spec, pad_id=0, longest=W_SMALL.longest)
    found: list[list[Tensor]] = []
    for fuse_gradients in (False, "copies", True):
        engine = bigbatch.Engine(
            run.model,
            None,
            run.loss_fn,
            microbatch=bigbatch.TokenBudget(512),
            collate=run.collate,
            lengths=lambda samples: [len(sample["input_ids"]) for sample in samples],
            layout=run.layout,
            cuda_graphs=True,
            fuse_gradients=fuse_gradients,
            noise=False,
            check=False,
        )
        for _ in range(3):
            engine.backward(batch)
        assert engine.runner.disabled_reason is None
        found.append([parameter.grad.double().flatten() for parameter in run.model.parameters()])
        if fuse_gradients:
            assert engine.fused.reasons == {}
            linear = sum(p.numel() for n, p in run.model.named_parameters() if p.ndim == 2)
            assert engine.fused.copies.num_bytes == 2 * linear
        engine.release_cuda_graphs()
    ordinary, copied, fused = map(torch.cat, found)
    for other in (copied, fused):  # attention adds in another order in every run
        assert torch.nn.functional.cosine_similarity(other, ordinary, dim=0) > 0.9999
