"""Products in float8 on CUDA: their values, compiled and captured, for any number of tokens, and their memory."""

import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bigbatch import Engine
from bigbatch.autotune.peak_prediction import PeakPredictor
from bigbatch.cli import main
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec, fp8_obstacle
from bigbatch.lm.model.fp8 import use_fp8
from bigbatch.lm.model.fp8_gradient import compare_gradients
from bigbatch.lm.model.setup import set_up_model
from support.emulated_fp8 import VOCABULARY, llama, needs_torchao
from support.language_models import metrics, records, save_model_folder, write_jsonl

pytestmark = [
    pytest.mark.gpu,
    needs_torchao,
    pytest.mark.filterwarnings("ignore"),  # of compilers
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs products in float8"
    ),
]
DEVICE = torch.device("cuda")
FP8 = DeviceSpec(DEVICE, "fp8")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ACCUMULATED = 2.0**-13
"""Relative to the largest product of a sum: Hopper adds products of float8 with at least 13 bits."""
LENGTHS = (64, 31, 17, 50, 9, 40)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as float8 numbers under the largest power of two that leaves them in range, in float64."""
    wide = values.detach().double().cpu()
    scale = 2.0 ** torch.floor(torch.log2(torch.finfo(dtype).max / wide.abs().max()))
    return (wide * scale).float().to(dtype).double() / scale


def assert_product(found: Tensor, one: Tensor, other: Tensor) -> None:
    """Check a product of float8 numbers against float64."""
    products = (one[:, :, None] * other[None]).abs()
    bound = (one.shape[1] + 2) * ACCUMULATED * products.amax(dim=1) + ACCUMULATED * products.sum(dim=1)
    assert ((found.double().cpu() - one @ other).abs() <= bound).all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tokens", [7, 32])
def test_cuda_products_are_those_of_rounded_values(compiled: bool, tokens: int) -> None:
    torch._dynamo.reset()
    model = llama().to(DEVICE)
    fp8 = use_fp8(model, TrainConfig(model="base"), FP8)
    assert fp8 is not None
    layer: Any = fp8.layers["model.layers.1.mlp.up_proj"]
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(tokens, 32, generator=generator).to(DEVICE).requires_grad_()
    gradient = torch.randn(tokens, 48, generator=generator).to(DEVICE)
    output = torch.compile(layer, dynamic=True)(inputs) if compiled else layer(inputs)
    output.backward(gradient)
    x, w, g = rounded(inputs, E4M3), rounded(layer.weight, E4M3), rounded(gradient, E5M2)
    assert_product(output.detach(), x, w.T)
    assert inputs.grad is not None
    assert_product(inputs.grad, g, w)
    assert_product(layer.weight.grad, g.T, x)


def larger_llama() -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**size, vocab_size=VOCABULARY)).to(DEVICE)


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    return [{"input_ids": tokens, "labels": tokens.roll(-1)} for tokens in rows]


@pytest.mark.parametrize(
    "settings", [{"compile": "none"}, {"compile": "graphs"}, {"compile": "graphs", "lora_rank": 8}]
)
def test_update_is_near_that_of_bf16(settings: dict[str, Any]) -> None:
    assert fp8_obstacle(DEVICE) is None
    torch._dynamo.reset()
    found = {}
    for precision in ("bf16", "fp8"):
        config = TrainConfig(model="base", max_length=max(LENGTHS), precision=precision, **settings).resolved()
        setup = set_up_model(larger_llama(), config, DeviceSpec(DEVICE, precision), pad_id=0, longest=max(LENGTHS))
        assert not any("not compiled" in note for note in setup.notes), setup.notes
        parameters = [p for p in setup.model.parameters() if p.requires_grad]
        engine = Engine(
            setup.model,
            torch.optim.SGD(parameters, lr=0.0),
            setup.training_loss,
            microbatch=2,
            collate=setup.collate,
            layout=setup.layout,
            cuda_graphs=setup.uses_cuda_graphs,
            lengths=lambda batch: [len(sample["input_ids"]) for sample in batch],
        )
        for _ in range(3):  # eager, captured, replayed
            engine.backward(sorted(samples(), key=lambda sample: -len(sample["input_ids"])))
            gradients = [p.grad.double().flatten().clone() for p in parameters]
            setup.model.zero_grad()
        found[precision] = torch.cat(gradients)
        if precision == "fp8":
            compared = compare_gradients(setup, samples()[:4], DEVICE)
            assert compared is not None
            print(compared)
            assert 0.95 < compared.cosine < 0.99999
        engine.release_cuda_graphs()
    cosine = float(torch.cosine_similarity(found["bf16"], found["fp8"], dim=0))
    print(f"cosine of whole updates {cosine:.4f}")
    assert 0.95 < cosine < 0.99999


def test_peak_of_eager_step_is_predicted() -> None:
    gc.collect()
    held_bytes = torch.cuda.memory_allocated()  # by other tests of this process
    config = TrainConfig(model="base", max_length=64, compile="none", gradient_checkpointing="none").resolved()
    setup = set_up_model(larger_llama(), config, FP8, pad_id=0, longest=64)
    parameters = [p for p in setup.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    microbatch = {name: t.to(DEVICE) for name, t in setup.collate([samples()[0]] * 64).items()}
    predicted = PeakPredictor.from_training(setup.model, optimizer, setup.training_loss).predict(microbatch).peak_bytes
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        loss_sum, count = setup.training_loss(setup.model, microbatch)
        (loss_sum / count).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # as sums, which stay
    peak = torch.cuda.max_memory_allocated() - held_bytes
    print(f"peak {peak:,} bytes, predicted {predicted:,}, held by others {held_bytes:,}")
    assert peak < 1.1 * predicted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "data.jsonl", records(64))
    save_model_folder(tmp_path / "base")
    return tmp_path


def test_cuda_run_learns_and_prints_cosine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    losses = []
    for mode in ("none", "graphs"):
        words = {
            "data": folder / "data.jsonl", "model": folder / "base", "device": "cuda", "precision": "fp8", "lr": 0.01,
            "compile": mode, "steps": 8, "global-batch": 16, "microbatch": 4, "max-length": 64, "out": folder / mode,
        }  # fmt: skip
        assert main(["train", *(f"--{name}={value}" for name, value in words.items()), "--no-cache"]) == 0
        shown = capsys.readouterr().out
        assert "fp8: 14 of 15 linear layers (tensorwise, torchao " in shown
        assert re.search(r"fp8: cosine of the gradient with that of bf16 products (0\.9\d+|1\.0000) ", shown)
        assert "CUDA graphs are disabled" not in shown
        print(shown)
        losses.append([row["loss"] for row in metrics(folder / mode)])
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)
