"""Runs with base weights in 4 bits: adapters, facts, resumed and merged runs, and the predicted bytes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bigbatch.cli import main
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.planning.data_statistics import measure_data
from bigbatch.lm.planning.device_target import resolve_target
from bigbatch.lm.planning.estimator import RunEstimator
from bigbatch.lm.training.resume import run_facts
from bigbatch.lm.training.setup import set_up_training
from support.language_models import load_peft, metrics, records, save_model_folder, write_jsonl
from support.tiers import slow

INPUT = torch.tensor([[0, 5, 200, 17, 40]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "data.jsonl", records(40))
    save_model_folder(tmp_path / "base")
    return tmp_path


def words(folder: Path, out: str, **more: Any) -> list[str]:
    settings = {
        "data": folder / "data.jsonl", "model": folder / "base", "lora-rank": 2, "quantize": "nf4", "steps": 6,
        "lr": 0.05, "global-batch": 8, "microbatch": 4, "checkpoint-every": 2, "max-length": 32, "device": "cpu",
        "out": folder / out,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in (settings | more).items()]


def no_progress(activity: str, done: int = 0, total: int = 0) -> None: ...


def config(folder: Path, **more: Any) -> TrainConfig:
    settings = {"lora_rank": 2, "quantize": "nf4", "microbatch": 4, "max_length": 32}
    base, data = str(folder / "base"), str(folder / "data.jsonl")
    return TrainConfig(model=base, data=data, device="cpu", **settings | more)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=INPUT).logits
    return found


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed:FutureWarning")  # raised by peft
def test_run_saves_adapters_for_the_unquantized_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words(folder, "run")]) == 0
    shown = capsys.readouterr().out
    assert "14 linear layers with 5,120 weights in 4 bits take 2.8 KiB; unquantized, in float32: 38.8 KiB" in shown
    assert "trained parameters: 1,088 of 16,144 (6.7 %)" in shown
    assert "--quantize nf4" in shown.splitlines()[-1]
    rows = metrics(folder / "run")
    assert rows[-1]["loss"] < rows[0]["loss"]
    adapted = load_peft(folder / "base", folder / "run" / "adapter")
    assert main(["merge", str(folder / "run"), "--out", str(folder / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-5)
    assert main(["generate", str(folder / "run"), "def", "--device", "cpu", "--max-new-tokens", "3"]) == 0


def test_fingerprint_is_that_of_the_unquantized_weights(folder: Path) -> None:
    quantized = run_facts(set_up_training(config(folder)))
    plain = run_facts(set_up_training(config(folder, quantize=None)))
    for name in ("frozen_sha256", "weights_dtype", "model"):
        assert quantized[name] == plain[name]
    half = run_facts(set_up_training(config(folder, precision="bf16")))
    assert half["weights_dtype"] == "torch.bfloat16"
    only_bf16 = run_facts(set_up_training(config(folder, quantize=None, precision="bf16-weights")))
    assert half["frozen_sha256"] == only_bf16["frozen_sha256"]


def test_changed_base_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words(folder, "run")]) == 0
    (folder / "run" / "adapter").rename(folder / "moved")
    path = folder / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-6  # less than 4 bits would show
    save_file(tensors, path, metadata={"format": "pt"})
    assert main(["resume", str(folder / "run")]) == 2
    assert "differ from those that its adapters were trained with" in capsys.readouterr().err
    (folder / "moved").rename(folder / "run" / "adapter")
    assert main(["merge", str(folder / "run"), "--out", str(folder / "merged")]) == 2
    assert "are not those that the adapters" in capsys.readouterr().err


@pytest.mark.parametrize("precision", [slow("float32"), "bf16"])
@pytest.mark.parametrize("quantize", ["nf4", "nf4-double"])
def test_plan_knows_the_bytes_of_parameters(folder: Path, quantize: str, precision: str) -> None:
    asked = config(folder, quantize=quantize, precision=precision).resolved()
    model = set_up_training(asked).model
    real = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    target = resolve_target(asked)
    estimator = RunEstimator(asked, target, measure_data(asked, progress=no_progress))
    assert estimator.predict(4).parts["parameters"] == real
    unquantized = RunEstimator(
        asked.model_copy(update={"quantize": None}), target, measure_data(asked, progress=no_progress)
    )
    assert estimator.num_parameters == unquantized.num_parameters
    assert estimator.predict(4).parts["parameters"] < unquantized.predict(4).parts["parameters"]


def test_plan_suggests_quantization_of_a_lora_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [word for word in words(folder, "run") if not word.startswith(("--out", "--quantize"))]
    assert main(["plan", *flags, "--json"]) == 0
    levers = {lever["flags"] for lever in json.loads(capsys.readouterr().out)["levers"]}
    assert "--quantize nf4" in levers
    assert main(["plan", *flags, "--quantize", "nf4"]) == 0
    assert "  --quantize" not in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of compilers
def test_captured_run_on_cuda_equals_eager_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = folder / "base"
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=308)).save_pretrained(base)
    for compiled in ("none", "graphs"):
        more = {"device": "cuda", "compile": compiled, "precision": "bf16", "steps": 4, "optimizer": "adamw-8bit"}
        assert main(["train", *words(folder, compiled, **more), "--gradient-checkpointing=full"]) == 0
    assert "not" not in "".join(line for line in capsys.readouterr().out.splitlines() if "compiled" in line)
    losses = [[row["loss"] for row in metrics(folder / out)] for out in ("none", "graphs")]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
