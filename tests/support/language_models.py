"""Tiny language models, tokenizers, data files and training runs for tests of `bigbatch.lm` and the commands."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging

from bigbatch.lm.bench.workload import Workload
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.tokenizer import train_tokenizer
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.training.setup import TrainingSetup, set_up_training
from bigbatch.lm.training.trainer import Trainer, TrainResult
from support import short_samples  # noqa: F401 - of the runs of this process

TINY_WORKLOAD = Workload(
    name="w-small",
    device="cpu",
    precision="float32",
    model={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 100,
        "tie_word_embeddings": True,
    },
    sequences=8,
    mean=2.5,
    shortest=4,
    longest=64,
)
"""A benchmark workload that runs in a second."""

WORDS = ["def", "return", "class", "für", "日本語", "value", "self", "None", "import", "x"]


def records(count: int) -> list[dict[str, str]]:
    """Return prompts and completions of different lengths."""
    return [
        {
            "prompt": " ".join(WORDS[(i + j) % 10] for j in range(1 + i % 7)),
            "completion": " ".join(WORDS[(3 * i + j) % 10] for j in range(1 + (5 * i) % 13)) + f" {i}",
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def conversations(count: int) -> list[dict[str, Any]]:
    """Return two-turn chats."""
    return [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"here is {i}"}]}
        for i in range(count)
    ]


def pairs(count: int) -> list[dict[str, Any]]:
    """Return prompts with a chosen and a rejected answer, of different lengths."""
    return [
        {"prompt": row["prompt"] + ":", "chosen": f" {row['completion']}", "rejected": " x" * (1 + (3 * i) % 11)}
        for i, row in enumerate(records(count))
    ]


def examples(count: int, *, negatives: int = 1) -> list[dict[str, Any]]:
    """Return queries with a positive passage and some negative ones, of different lengths."""
    rows = records(count)
    return [
        {
            "query": row["prompt"],
            "positive": row["completion"],
            "negative": [rows[(i + 7 * k) % count]["completion"] for k in range(1, 1 + negatives)],
        }
        for i, row in enumerate(rows)
    ]


def save_model_folder(folder: Path, *, kind: str = "llama", dropout: float = 0.0, layers: int = 2) -> Path:
    """Save a model with a few thousand parameters and its tokenizer."""
    tokenizer = train_tokenizer([row["completion"] for row in records(50)], vocabulary_size=300)
    size = {"vocab_size": len(tokenizer) + 8, "bos_token_id": 0, "eos_token_id": 1}
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    if kind == "gpt2":
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        model: Any = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=layers, n_head=2, n_positions=64, **size, **drops))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape, **size, num_key_value_heads=1, tie_word_embeddings=True))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape, **size, max_position_embeddings=64))
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class RecordingCallback:
    """A training callback that keeps every row, validation and sample."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.validations: list[tuple[int, float]] = []
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        self.validation_metrics: list[tuple[int, dict[str, float]]] = []
        self.samples: list[tuple[int, str]] = []

    def on_update(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def on_validation(self, step: int, loss: float) -> None:
        self.validations.append((step, loss))

    def on_evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        self.evaluations.append((step, dict(losses)))

    def on_validation_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.validation_metrics.append((step, dict(metrics)))

    def on_sample(self, step: int, text: str) -> None:
        self.samples.append((step, text))


def load_peft(base: Path, adapter: Path) -> Any:
    """Load a model with adapters as a user of peft does."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about names shared by peft and transformers
        warnings.filterwarnings("ignore", message=".* keys did not match any targeted module")  # of experts
        return PeftModel.from_pretrained(model, adapter).eval()


def run(folder: Path, **settings: Any) -> tuple[TrainingSetup, RecordingCallback, TrainResult]:
    """Train with the given settings, with ``folder`` as the run directory."""
    prepared = set_up_training(TrainConfig(device="cpu", **settings))
    recorder = RecordingCallback()
    directory = RunDirectory.create(folder, prepared.config.model_dump(mode="json"))
    return prepared, recorder, Trainer(prepared).run(directory, callback=recorder)


def metrics(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text
    return [json.loads(line) for line in text.splitlines()]
