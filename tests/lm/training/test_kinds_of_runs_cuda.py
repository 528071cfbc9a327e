"""Runs of every objective, of an own loss and of a new model on a CUDA device: they learn, and resume bit by bit."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigbatch import lm
from bigbatch.cli import main
from support.language_models import examples, metrics, pairs, records, save_model_folder, write_jsonl
from support.run_comparison import differences

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch hides it
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch.jit, in the first compilation of a process
    pytest.mark.filterwarnings("ignore:TensorFloat32"),  # of the compiler, which fails if it is an error
]

OBJECTIVES = {
    "sft": ("records", []),
    "dpo": ("pairs", ["--objective", "dpo"]),
    "reward": ("pairs", ["--objective", "reward"]),
    "embedding": ("examples", ["--objective", "embedding"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    save_model_folder(folder / "base", kind="qwen2")
    write_jsonl(folder / "records.jsonl", records(64))
    write_jsonl(folder / "pairs.jsonl", pairs(64))
    write_jsonl(folder / "examples.jsonl", examples(64))
    return folder


def words(folder: Path, kind: str, out: Path, *more: str) -> list[str]:
    data, objective = OBJECTIVES[kind]
    return [
        "train", *objective, "--model", str(folder / "base"), "--data", str(folder / f"{data}.jsonl"),
        "--device", "cuda", "--max-length", "64", "--global-batch", "16", "--lr", "0.01", "--no-cache",
        "--out", str(out), *more,
    ]  # fmt: skip


def remove_after(run: Path, step: int) -> None:
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize("precision", ["bf16", "float32"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_loss_falls_and_does_not_depend_on_microbatch(folder: Path, tmp_path: Path, kind: str, precision: str) -> None:
    losses = {}
    for size in ("3", "16", "auto"):
        out = tmp_path / size
        given = ["--steps", "12", "--microbatch", size, "--precision", precision, "--validation-fraction", "0"]
        assert main(words(folder, kind, out, *given)) == 0
        losses[size] = [row["loss"] for row in metrics(out)]
        assert losses[size][-1] < losses[size][0]
    tolerance = 2e-2 if precision == "bf16" else 1e-4
    for size in ("3", "auto"):
        assert losses[size][:4] == pytest.approx(losses["16"][:4], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_resumed_run_is_the_uninterrupted_one(folder: Path, tmp_path: Path, kind: str) -> None:
    given = ["--steps", "6", "--microbatch", "5", "--checkpoint-every", "2", "--deterministic", "--keep", "5"]
    assert main(words(folder, kind, tmp_path / "whole", *given)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    remove_after(tmp_path / "cut", 2)
    assert main(["resume", str(tmp_path / "cut")]) == 0
    assert not differences(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_adapters_on_bfloat16_weights_learn(folder: Path, tmp_path: Path, kind: str) -> None:
    given = ["--steps", "12", "--microbatch", "4", "--lora-rank", "4", "--validation-fraction", "0"]
    assert main(words(folder, kind, tmp_path / "run", *given)) == 0
    rows = metrics(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"]


def weighted_loss(model: Any, microbatch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logits = model(microbatch["input_ids"], attention_mask=microbatch["attention_mask"]).logits.float()
    labels = microbatch["labels"]
    weights = 1.0 + (labels % 3)
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return (losses * weights).sum(), ((labels != -100) * weights).sum()


@pytest.mark.parametrize("microbatch", [3, "auto"])
def test_own_loss_trains_a_new_model(folder: Path, tmp_path: Path, microbatch: Any) -> None:
    settings = {
        "data": str(folder / "records.jsonl"), "model_config": str(folder / "base"), "tokenizer": str(folder / "base"),
        "device": "cuda", "max_length": 32, "global_batch": 16, "microbatch": microbatch, "steps": 12, "lr": 1e-2,
        "no_cache": True, "out": str(tmp_path / "run"), "validation_every": 6,
    }  # fmt: skip
    result = lm.train(settings, loss_fn=weighted_loss)
    rows = metrics(result.path)
    assert len(rows) == 12
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)


def test_new_model_resumes(folder: Path, tmp_path: Path) -> None:
    given = [
        "train", "--model-config", str(folder / "base"), "--tokenizer", str(folder / "base"),
        "--data", str(folder / "records.jsonl"), "--device", "cuda", "--max-length", "32", "--global-batch", "16",
        "--microbatch", "4", "--steps", "6", "--checkpoint-every", "2", "--keep", "5", "--deterministic", "--no-cache",
        "--out", str(tmp_path / "whole"),
    ]  # fmt: skip
    assert main(given) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    remove_after(tmp_path / "cut", 2)
    assert main(["resume", str(tmp_path / "cut")]) == 0
    assert not differences(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("compiles", ["none", "layers"])
@pytest.mark.parametrize(("kind", "precision"), [("gpt2", "float32"), ("gpt2", "bf16"), ("qwen2", "bf16")])
def test_reproducible_runs_are_equal_for_any_budget(
    folder: Path, tmp_path: Path, kind: str, precision: str, compiles: str, capfd: pytest.CaptureFixture[str]
) -> None:
    save_model_folder(tmp_path / "base", kind=kind, dropout=0.1)
    texts = [{"text": " ".join(row["completion"] for row in records(50)[i % 40 : i % 40 + 9])} for i in range(900)]
    write_jsonl(tmp_path / "texts.jsonl", texts)
    cuts = {"one": ["--microbatch", "2"], "small": ["--token-budget", "4096"], "large": ["--token-budget", "16384"]}
    for name, cut in cuts.items():
        given = [
            "train", "--model", str(tmp_path / "base"), "--data", str(tmp_path / "texts.jsonl"), "--device", "cuda",
            "--precision", precision, "--max-length", "64", "--global-batch", "300", "--lr", "0.01", "--steps", "5",
            "--reproducible", "--quantum", "2", "--validation-fraction", "0", "--no-cache", "--compile", compiles,
            "--out", str(tmp_path / name), *cut,
        ]  # fmt: skip
        assert main(given) == 0
    for name in ("small", "large"):
        capfd.readouterr()
        assert main(["diff", str(tmp_path / "one"), str(tmp_path / name)]) == 0
        assert capfd.readouterr().out.startswith("equal in 5 updates")
