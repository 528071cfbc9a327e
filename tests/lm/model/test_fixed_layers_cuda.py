"""Layers of reproducible runs on CUDA: no kernel is timed, and nothing that the process ran before changes bits."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from bigbatch.deterministic import deterministic_kernels
from bigbatch.lm.config.field_types import CHECKPOINTING_MODES
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.chunked_loss import ChunkedCausalLMLoss
from bigbatch.lm.model.setup import ModelSetup, set_up_model

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # of compilers
DEVICE = torch.device("cuda")
LONGEST = 96
QUANTA = ((LONGEST, 1), (40, 63), (7, 7), (90, 80))
KINDS: dict[str, Any] = {
    "llama": LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        vocab_size=20_000, max_position_embeddings=512,
    ),
    "gpt2": GPT2Config(
        n_embd=64, n_layer=3, n_head=4, n_positions=512, vocab_size=300, resid_pdrop=0.1, embd_pdrop=0, attn_pdrop=0
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def arranged(kind: str, precision: Any, *, longest: int = LONGEST, **settings: Any) -> ModelSetup:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[kind], dtype=torch.float32).to(DEVICE)
    config = TrainConfig(model="the-model", precision=precision, **settings).resolved()
    return set_up_model(model, config, DeviceSpec(DEVICE, precision), pad_id=0, longest=longest)


def gradients(run: ModelSetup, *lengths: int) -> Tensor:
    """The loss and all gradients of one quantum."""
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = [torch.randint(300, (length,), generator=generator) for length in lengths]
    row = run.collate([{"input_ids": each, "labels": each.roll(-1)} for each in tokens])
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    with deterministic_kernels():
        torch.manual_seed(0)
        loss_sum, _ = run.loss_fn(run.model, {name: tensor.to(DEVICE) for name, tensor in row.items()})
        found = torch.autograd.grad(loss_sum, trained)
    return torch.cat([loss_sum.detach()[None], *[gradient.flatten() for gradient in found]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_no_kernel_is_timed_and_nothing_compiled_later(kind: str, precision: str) -> None:
    run = arranged(kind, precision, reproducible=True)
    assert run.layers is not None
    assert run.has_compiled_layers, run.notes
    compiled = counters["stats"]["unique_graphs"]
    for mode in CHECKPOINTING_MODES:
        run.layers.set_checkpointing(mode)
        for lengths in QUANTA:
            gradients(run, *lengths)
    assert counters["stats"]["unique_graphs"] == compiled > 0
    assert run.layers.eager_calls is not None
    assert run.layers.eager_calls[0] == 0
    if kind == "llama":
        assert isinstance(run.loss_fn, ChunkedCausalLMLoss)
        assert run.loss_fn.fused_code is not None
        assert run.loss_fn.fused_code.num_calls > run.loss_fn.fused_code.num_eager_calls == 0
    timed = {name: count for name, count in counters["inductor"].items() if "bench" in name}
    assert timed == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_earlier_models_and_orders_change_no_bits(kind: str, precision: str) -> None:
    run = arranged(kind, precision, reproducible=True)
    expected = [gradients(run, *lengths) for lengths in QUANTA]
    for settings in ({"compile": "layers"}, {"reproducible": True, "longest": 400}):
        other = arranged(kind, precision, **settings)
        for length in (3, 400):
            gradients(other, length, length)
    run = arranged(kind, precision, reproducible=True)
    found = [gradients(run, *lengths) for lengths in reversed(QUANTA)][::-1]
    assert all(map(torch.equal, found, expected))
