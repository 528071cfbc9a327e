"""Trainers of TRL with a small tokenizer, model and dataset, and the gradients that their updates should have had."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from integrations.transformers import trainer_cases as cases

if "experimental" in KTOTrainer.__mro__[1].__module__:  # before it moved, where the public names warn
    KTOConfig, KTOTrainer = KTOConfig.__mro__[1], KTOTrainer.__mro__[1]  # type: ignore[misc]

KINDS = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "reward": (RewardTrainer, RewardConfig),
    "kto": (KTOTrainer, KTOConfig),
}
WORDS = [f"w{index}" for index in range(16)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 16 words."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def model(kind: str = "sft", seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a small model for a kind of trainer."""
    torch.manual_seed(seed)
    is_reward = kind == "reward"
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        **({"num_labels": 1} if is_reward else {}),
    )
    made = (LlamaForSequenceClassification if is_reward else LlamaForCausalLM)(config)
    return made.to(dtype)


def dataset(kind: str, number: int = cases.NUM_SAMPLES, seed: int = 0) -> Dataset:
    """Return prompts and completions of 1 to 8 words."""
    generator = torch.Generator().manual_seed(seed)

    def text() -> str:
        length = int(torch.randint(1, 9, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())

    columns: dict[str, Any] = {"prompt": [text() for _ in range(number)]}
    if kind in ("sft", "kto"):
        columns["completion"] = [" " + text() for _ in range(number)]
    else:
        columns |= {name: [" " + text() for _ in range(number)] for name in ("chosen", "rejected")}
    if kind == "kto":
        columns["label"] = (torch.rand(number, generator=generator) > 0.4).tolist()
    return Dataset.from_dict(columns)


def make(folder: Path, kind: str, rows: Dataset | None = None, **settings: Any) -> tuple[Any, cases.Recorder]:
    """Return a trainer of a kind, and the recorder of its updates; its reference model has other weights."""
    trainer_kind, config = KINDS[kind]
    recorder = cases.Recorder()
    has_reference = issubclass(trainer_kind, DPOTrainer | KTOTrainer)
    extra = {"ref_model": model(kind, seed=1)} if has_reference else {}
    trainer = trainer_kind(
        model=model(kind),
        args=cases.arguments(folder, config, **settings),
        train_dataset=dataset(kind) if rows is None else rows,
        processing_class=tokenizer(),
        callbacks=[recorder],
        **extra,
    )
    return trainer, recorder


def errors(folder: Path, kind: str, recorder: cases.Recorder, size: int = cases.BATCH * cases.STEPS, **settings: Any):
    """Return the errors of recorded gradients against those of whole batches in one piece, by a stock trainer."""
    stock, _ = make(folder, kind, **settings)
    rows = [dict(row) for row in stock.train_dataset]
    columns = stock._signature_columns or ()
    rows = [{k: v for k, v in row.items() if k in columns} if columns else row for row in rows]
    parts = cases.windows(rows, stock.data_collator, size)
    return cases.errors(
        recorder, stock.model, parts, lambda _, batch: stock.compute_loss(stock.model.train(), dict(batch))
    )
