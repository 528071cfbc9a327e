"""Trainers of sentence-transformers: exact for losses of independent samples, refused for contrastive ones."""

from pathlib import Path

import pytest
import torch

import bigbatch
from bigbatch.integrations.transformers import exact
from integrations.transformers import trainer_cases as cases
from support import full_batch_reference as ref

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
    assert end.endswith(
        "For losses with in-batch negatives, and all others that compare the samples of a batch, use exact() of "
        "bigbatch.integrations.sentence_transformers."
    )
    assert not recorder.gradients


class OptimizerRecorder(cases.Recorder):
    """Records the gradients of all parameters in the optimizer."""

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.gradients.append({str(number): p.grad.clone() for number, p in enumerate(parameters)})

    def on_step_end(self, args, state, control, optimizer=None, **_):
        optimizer.zero_grad()


def test_parameters_of_loss_are_trained(tmp_path: Path):
    rows = dataset(second=texts(), label=[number % 3 for number in range(NUM_SAMPLES)])
    found = []
    for size, steps in ((4, 8), (32, 1)):
        own, recorder = model(), OptimizerRecorder()
        arguments = cases.arguments(
            tmp_path,
            SentenceTransformerTrainingArguments,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            num_train_epochs=2,
            remove_unused_columns=True,
        )
        torch.manual_seed(0)
        loss = losses.SoftmaxLoss(own, WIDTH, 3).double()
        trainer = SentenceTransformerTrainer(own, arguments, train_dataset=rows, loss=loss, callbacks=[recorder])
        (exact(trainer) if steps > 1 else trainer).train()
        found.append(recorder.gradients)
    assert len(found[0]) == 2
    for gradients, wanted in zip(*found, strict=True):
        assert ref.relative_error(gradients, wanted) <= 1e-12


def test_loader_reads_attributes_of_the_collator(tmp_path: Path):
    trainer, _ = make(tmp_path, dataset(**scores()), losses.CosineSimilarityLoss)
    loader = exact(trainer).get_train_dataloader()
    assert loader.collate_fn.valid_label_columns == trainer.data_collator.valid_label_columns
    assert loader.collate_fn is not trainer.data_collator
