"""Small SentenceTransformers made from a config, their trainers, and what each update should have been."""

import copy
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
from datasets import Dataset
from packaging import version
from safetensors.torch import save_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import BertConfig, BertModel, TrainerCallback
from transformers.utils import logging

WORDS = [f"w{number}" for number in range(60)]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WIDTH = 16
# Before version 6.2 the stock cached losses differentiate through float32.
EXACT_WHERE_CACHED = 1e-12 if version.parse(sentence_transformers.__version__) >= version.parse("6.2") else 1e-6

Loss = Callable[[SentenceTransformer], Any]


@cache
def _checkpoint(dropout: float, seed: int, reverse: bool) -> str:
    """Return a folder with a tiny BERT and its tokenizer."""
    logging.disable_progress_bar()
    folder = tempfile.mkdtemp()
    words = WORDS[::-1] if reverse else WORDS
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.save(f"{folder}/tokenizer.json")
    names = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    Path(folder, "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    config.to_json_file(f"{folder}/config.json")  # save_pretrained writes on the first rank only
    save_file(BertModel(config).state_dict(), f"{folder}/model.safetensors", {"format": "pt"})
    return folder


def model(
    dropout: float = 0.0, *, seed: int = 0, reverse: bool = False, max_length: int = 32, include_prompt: bool = True
) -> SentenceTransformer:
    """Return a tiny BERT with mean pooling in float64; ``reverse`` numbers the words of its tokenizer in reverse."""
    return copy.deepcopy(_model(dropout, seed, reverse, max_length, include_prompt))


@cache
def _model(dropout: float, seed: int, reverse: bool, max_length: int, include_prompt: bool) -> SentenceTransformer:
    transformer = Transformer(_checkpoint(dropout, seed, reverse), max_seq_length=max_length)
    pooling = Pooling(WIDTH, include_prompt=include_prompt)
    return SentenceTransformer(modules=[transformer, pooling], device="cpu").double()


def rows(
    number: int, columns: Sequence[str] = ("anchor", "positive"), *, seed: int = 0, **others: list[Any]
) -> Dataset:
    """Return rows of texts of 3 to 12 words, and other columns."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(3, 12)))

    return Dataset.from_dict({column: [text() for _ in range(number)] for column in columns} | others)


class Recorder(TrainerCallback):
    """Records gradients and weights of all parameters in the optimizer before each update."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor | None]] = []
        self.weights: list[list[Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.gradients.append([None if p.grad is None else p.grad.clone() for p in parameters])
        self.weights.append([p.detach().clone() for p in parameters])

    def on_step_end(self, args, state, control, optimizer=None, **_):
        optimizer.zero_grad()  # before version 6.2 gradients of the parameters of losses are not cleared


def arguments(folder: Path, **settings: Any) -> SentenceTransformerTrainingArguments:
    """Return arguments of a short run on the CPU."""
    defaults = {
        "per_device_train_batch_size": 24, "num_train_epochs": 1, "learning_rate": 1e-3, "max_grad_norm": 0.0,
        "save_strategy": "no", "logging_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False, "seed": 7,
    }  # fmt: skip
    return SentenceTransformerTrainingArguments(str(folder), **(defaults | settings))


def mnrl(own: SentenceTransformer) -> nn.Module:
    """Return the loss of most tests."""
    return losses.MultipleNegativesRankingLoss(own)


def make(
    folder: Path,
    data: Any,
    loss: Loss = mnrl,
    own: SentenceTransformer | None = None,
    *,
    kind: type[SentenceTransformerTrainer] = SentenceTransformerTrainer,
    callbacks: Sequence[TrainerCallback] = (),
    eval_dataset: Any = None,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> tuple[SentenceTransformerTrainer, Recorder]:
    """Return a trainer, and the recorder of its updates."""
    own = (model() if own is None else own).to(dtype)
    torch.manual_seed(1)
    made = loss(own)
    for each in made.values() if isinstance(made, dict) else [made]:
        each.to(dtype)
    recorder = Recorder()
    trainer = kind(
        own,
        arguments(folder, **settings),
        train_dataset=data,
        eval_dataset=eval_dataset,
        loss=made,
        callbacks=[recorder, *callbacks],
    )
    return trainer, recorder


def errors(found: Recorder, wanted: Recorder) -> list[float]:
    """Return the relative error of the gradient of each update; both have gradients for the same parameters."""
    return [relative_error(own, right) for own, right in zip(found.gradients, wanted.gradients, strict=True)]


def relative_error(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> float:
    """Return ‖found − wanted‖ / ‖wanted‖."""
    assert [each is None for each in found] == [each is None for each in wanted]
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if a is not None and b is not None]
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    return float(difference / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def runs_out(forward: Callable[..., Any], most: int) -> Callable[..., Any]:
    """Return a forward whose memory does not suffice for the gradients of more than some samples."""

    def limited(features: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and len(features["input_ids"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(features, **options)

    return limited
