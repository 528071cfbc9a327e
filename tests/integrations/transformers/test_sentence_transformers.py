"""Trainers of sentence-transformers: exact for losses of independent samples, refused for contrastive ones."""

from pathlib import Path

import pytest
import torch

import bigbatch
from bigbatch.integrations.transformers import exact
from integrations.transformers import trainer_cases as cases

pytest.importorskip("sentence_transformers", minversion="5.0", reason="sentence-transformers is not installed")

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

WORDS = [f"w{number}" for number in range(30)]
NUM_SAMPLES, WIDTH = 31, 8  # micro-batches of 4, and one of 3


def model() -> SentenceTransformer:
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=WIDTH)], device="cpu").double()


def dataset(**columns: list) -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def text() -> str:
        length = int(torch.randint(2, 8, (), generator=generator))
        return " ".join(WORDS[index] for index in torch.randint(30, (length,), generator=generator))

    return Dataset.from_dict({"first": [text() for _ in range(NUM_SAMPLES)], **columns})


def texts() -> list[str]:
    return dataset()["first"][::-1]


def make(folder: Path, rows: Dataset, loss: type) -> tuple[SentenceTransformerTrainer, cases.Recorder]:
    arguments = cases.arguments(
        folder,
        SentenceTransformerTrainingArguments,
        gradient_accumulation_steps=8,
        train_sampling_strategy="random",
        remove_unused_columns=True,
    )
    recorder, own = cases.Recorder(), model()
    trainer = SentenceTransformerTrainer(own, arguments, train_dataset=rows, loss=loss(own), callbacks=[recorder])
    return trainer, recorder


def scores() -> dict[str, list]:
    return {"second": texts(), "label": torch.rand(NUM_SAMPLES, generator=torch.Generator().manual_seed(1)).tolist()}


def targets() -> dict[str, list]:
    generator = torch.Generator().manual_seed(1)
    return {"label": torch.randn(NUM_SAMPLES, WIDTH, generator=generator, dtype=torch.float64).tolist()}


@pytest.mark.parametrize(
    ("loss", "columns"), [(losses.CosineSimilarityLoss, scores()), (losses.MSELoss, targets())], ids=["cosine", "mse"]
)
def test_loss_of_independent_samples_is_exact(tmp_path: Path, loss, columns):
    rows = dataset(**columns)
    trainer, recorder = make(tmp_path, rows, loss)
    whole = trainer.data_collator([dict(row) for row in rows])
    exact(trainer).train()
    stock, _ = make(tmp_path, rows, loss)
    errors = cases.errors(recorder, stock.model, [whole], lambda model, batch: stock.compute_loss(model, dict(batch)))
    assert max(errors) <= 1e-6
    assert trainer.bigbatch_report.num_microbatches == 8


def test_contrastive_loss_is_refused(tmp_path: Path):
    trainer, recorder = make(tmp_path, dataset(second=texts()), losses.MultipleNegativesRankingLoss)
    with pytest.raises(bigbatch.InputError) as caught:
        exact(trainer).train()
    start, _, end = str(caught.value).partition(" (relative error of the gradient: ")
    assert start == (
        "the loss of SentenceTransformerTrainer (SentenceTransformer) is a mean over none of the known units"
    )
    assert "samples influence one another" in end
    assert not recorder.gradients


def test_loader_reads_attributes_of_the_collator(tmp_path: Path):
    trainer, _ = make(tmp_path, dataset(**scores()), losses.CosineSimilarityLoss)
    loader = exact(trainer).get_train_dataloader()
    assert loader.collate_fn.valid_label_columns == trainer.data_collator.valid_label_columns
    assert loader.collate_fn is not trainer.data_collator
