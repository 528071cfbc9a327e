"""``bigbatch merge`` and ``generate`` with LoRA adapters: the same model in other files, or one sentence."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bigbatch.cli import main
from support.command_line import SENTENCE
from support.language_models import load_peft, records, save_model_folder, write_jsonl

TOKENS = torch.tensor([[0, 5, 200, 17, 40]])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, two models, and a run that trained adapters on the first."""
    folder = tmp_path_factory.mktemp("made")
    write_jsonl(folder / "data.jsonl", records(40))
    save_model_folder(folder / "base")
    save_model_folder(folder / "other")
    assert train(folder, "run", "--lora-targets", "q_proj,v_proj", "--dora") == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current folder; the adapters name the model in the original one."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(folder: Path, out: str, *more: str) -> int:
    settings = {
        "data": folder / "data.jsonl", "model": folder / "base", "global-batch": 8, "microbatch": 3, "steps": 4,
        "max-length": 32, "lr": 0.05, "device": "cpu", "lora-rank": 2,
    }  # fmt: skip
    words = [str(word) for name, value in settings.items() if f"--{name}" not in more for word in (f"--{name}", value)]
    return main(["train", *words, "--out", str(folder / out), *more])


def said(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 0
    printed, complained = capfd.readouterr()
    assert complained == ""
    return printed


def refused(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    complained = capfd.readouterr().err
    assert SENTENCE.fullmatch(complained)
    return complained.removeprefix(f"bigbatch {words[0]}: ").rstrip("\n")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def test_merged_folder_has_logits_of_run(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    printed = said(capfd, "merge", "run", "--out", "deep/merged")
    base = json.loads((folder / "run/adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert f"deep/merged is {base} with the adapters in run/adapter, for AutoModelForCausalLM" in printed
    merged = logits(AutoModelForCausalLM.from_pretrained("deep/merged"))
    assert torch.allclose(merged, logits(load_peft(folder / "base", folder / "run/adapter")), atol=1e-5)
    assert not torch.allclose(merged, logits(AutoModelForCausalLM.from_pretrained("base")), atol=1e-3)
    assert AutoTokenizer.from_pretrained("deep/merged")("für").input_ids


def test_adapters_and_merged_model_generate_same_text(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said(capfd, "merge", "run/adapter", "--out", "merged", "--model", "base")
    greedy = ("--temperature", "0", "--max-new-tokens", "9")
    texts = {said(capfd, "generate", name, *greedy) for name in ("run", "run/adapter", "merged")}
    assert len(texts) == 1
    assert said(capfd, "generate", "run", *greedy, "--model", "base") in texts


def test_number_of_trained_parameters_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_peft(folder / "base", folder / "run" / "adapter")
    trained, total = (
        sum(p.numel() for name, p in model.named_parameters() if "lora_" in name or everything)
        for everything in (False, True)
    )
    capfd.readouterr()
    train(folder, "again", "--lora-targets", "q_proj,v_proj", "--dora")
    printed = capfd.readouterr().out
    assert f"\ntrained parameters: {trained:,} of {total:,} ({100 * trained / total:.2g} %)\n" in printed
    assert (
        "\n  adapter/       LoRA adapters and tokenizer, for PeftModel.from_pretrained and bigbatch merge\n" in printed
    )
    assert " --lora-rank 2 --lora-targets q_proj,v_proj --dora   checks" in printed
    train(folder, "full", "--lora-rank", "0")
    base = AutoModelForCausalLM.from_pretrained("base")
    assert f"\ntrained parameters: all {base.num_parameters():,}\n" in capfd.readouterr().out


def test_finished_run_with_adapters_is_not_resumed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "run is already finished: all 4 updates are done" in said(capfd, "resume", "run")
    shutil.rmtree("run/adapter")
    assert "\ntrained parameters: " in said(capfd, "resume", "run")
    assert Path("run/adapter/adapter_model.safetensors").exists()


def test_adapters_replace_model_of_an_earlier_version(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("run/checkpoints/step-4")
    Path("run/adapter").rename("run/model")
    said(capfd, "resume", "run")
    assert Path("run/adapter").is_dir()
    assert not list(Path("run").glob("model*"))


def test_adapters_on_tiny_are_merged_by_the_run(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(folder, "small", "--model", "tiny", "--steps", "1") == 0
    printed = capfd.readouterr().out
    assert "the adapters are saved within model/: no folder holds the weights of --model tiny without them" in printed
    assert AutoModelForCausalLM.from_pretrained("small/model").num_parameters() > 1e6
    assert not Path("small/adapter").exists()
    assert refused(capfd, "merge", "small", "--out", "merged") == (
        "small has no adapters to merge: small/model is a whole model."
    )


def test_missing_model_of_adapters_is_one_sentence(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = folder / "run/adapter/adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"base_model_name_or_path": "/nowhere/base"}))
    for words in (("merge", "run", "--out", "merged"), ("generate", "run")):
        assert refused(capfd, *words) == (
            "the model /nowhere/base, on which the adapters in run/adapter were trained, does not exist: pass its "
            "folder with --model."
        )
    assert refused(capfd, "generate", "run", "--model", "./bass") == "--model ./bass does not exist: did you mean base?"
    said(capfd, "merge", "run", "--out", "merged", "--model", "base")


def test_other_weights_under_adapters_are_rejected(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words in (("merge", "run", "--out", "merged"), ("generate", "run")):
        assert refused(capfd, *words, "--model", "other") == (
            "the weights of other are not those that the adapters in run/adapter were trained on. Restore them, or "
            "pass the right model with --model."
        )
    assert not Path("merged").exists()


def test_weights_are_checked_in_dtype_of_run(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(folder, "narrow", "--precision", "bf16-weights")
    capfd.readouterr()
    said(capfd, "merge", "narrow", "--out", "merged")
    assert AutoModelForCausalLM.from_pretrained("merged", dtype="auto").dtype == torch.float32
    assert refused(capfd, "merge", "narrow", "--out", "again", "--model", "other").startswith("the weights of other ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("merge run", "--out is missing: it has no default."),
        ("merge run --out base", "--out base holds other files: name a new or empty folder."),
        ("merge run --out run/model", "--out run/model is replaced when the run is resumed: name another folder."),
        ("merge base --out merged", "base has no adapters to merge: base is a whole model."),
        ("merge data.jsonl --out merged", "run data.jsonl does not exist: create one with bigbatch train."),
        ("generate base --model other", "--model does nothing here: base is a whole model. Leave it out."),
        (
            "train --model run/adapter",
            "--model run/adapter is a folder of adapters. Merge them into their model with bigbatch merge run/adapter "
            "--out DIR, and pass that.",
        ),
    ],
)
def test_wrong_use_is_one_sentence(folder: Path, capfd: pytest.CaptureFixture[str], words: str, sentence: str) -> None:
    assert refused(capfd, *words.split()) == sentence


def test_run_without_adapters_is_reported(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("run/adapter")
    assert refused(capfd, "merge", "run", "--out", "merged") == (
        "run contains no trained model: a run saves it in run/model when it ends, its LoRA adapters in run/adapter."
    )


def test_merge_that_cannot_be_written_is_one_sentence(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert refused(capfd, "merge", "run", "--out", "file/merged") == (
        f"--out file/merged cannot be written: {folder / 'file'} is a file."
    )


def test_pipe_among_adapters_is_rejected(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("run/adapter/tokenizer.model")
    assert (
        refused(capfd, "merge", "run", "--out", "m") == "run/adapter/tokenizer.model is not a regular file: remove it."
    )
