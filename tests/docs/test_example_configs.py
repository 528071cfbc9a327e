"""Every file in examples/ is read as a user's is, and trains a small model of the same architecture."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bigbatch.cli import main
from bigbatch.cli.arguments import parse
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.directory import RunDirectory
from support.language_models import conversations, metrics, records, save_model_folder, write_jsonl
from support.tiers import slow

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in (".toml", ".yaml"))
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
HEADS = {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 256}
ARCHITECTURES: dict[str, Any] = {
    "llama-3.2-1b-lora": (LlamaForCausalLM, LlamaConfig, SHAPE | HEADS),
    "qwen3-0.6b": (Qwen3ForCausalLM, Qwen3Config, SHAPE | HEADS),
    "gemma-3-1b-lora": (Gemma3ForCausalLM, Gemma3TextConfig, SHAPE | HEADS),
    "mistral-7b-lora": (MistralForCausalLM, MistralConfig, SHAPE | HEADS),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}),
}


def settings_of(file: Path) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8")
    found: dict[str, Any] = tomllib.loads(text) if file.suffix == ".toml" else yaml.safe_load(text)
    return found


def test_five_families_have_an_example() -> None:
    assert {file.stem for file in FILES} == ARCHITECTURES.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_command_of_example_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = file.read_text(encoding="utf-8").splitlines()
    (command,) = [line.strip("# ") for line in lines if "bigbatch train" in line]
    assert f"--config examples/{file.name} " in command
    (config,) = parse("train", command.split()[2:])
    assert isinstance(config, TrainConfig)
    assert settings_of(file).keys() | {"data"} == config.model_fields_set


@pytest.mark.parametrize(
    "file", [file if file.stem == "gpt2" else slow(file) for file in FILES], ids=lambda file: file.stem
)
@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed:FutureWarning")  # raised by peft
def test_example_trains_a_small_model(file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model_class, config_class, shape = ARCHITECTURES[file.stem]
    base = save_model_folder(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model_class(config_class(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **shape)).save_pretrained(base)
    rows: list[Any] = records(20) if file.stem in ("gpt2", "gemma-3-1b-lora") else conversations(20)
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    small = ["--model", str(base), "--data", str(data), "--max-length", "128", "--device", "cpu", "--steps", "1"]
    small += ["--warmup-steps", "0", "--microbatch", "4", "--out", str(tmp_path / "run")]
    assert main(["plan", "--config", str(file), *small]) == 0
    assert main(["train", "--config", str(file), *small]) == 0
    printed, complained = capfd.readouterr()
    assert complained == ""
    assert f"trained parameters: {'all' if 'lora' not in file.stem else ''}" in printed
    run = RunDirectory(tmp_path / "run")
    assert run.adapter.is_dir() == ("lora" in file.stem)
    assert metrics(run.path)[0]["loss"] > 0
