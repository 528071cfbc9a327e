"""What `exact` refuses of trainers, arguments and losses of sentence-transformers, and what it says to do."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bigbatch

pytest.importorskip("sentence_transformers", minversion="6.0", reason="sentence-transformers is not installed")

from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer import losses
from torch import nn
from transformers import TrainerCallback

from bigbatch.integrations import transformers as for_transformers
from bigbatch.integrations.sentence_transformers import exact
from integrations.sentence_transformers import st_cases as cases


def refusal(trainer: Any, *, trains: bool = False, **settings: Any) -> str:
    """Return the sentence with which a trainer is refused."""
    run = exact(trainer, microbatch=5).train if trains else lambda: exact(trainer, **settings)
    with pytest.raises(bigbatch.InputError) as caught:
        run()
    return str(caught.value)


def test_accumulation_steps_are_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, cases.rows(48), gradient_accumulation_steps=4)
    assert refusal(trainer) == (
        "gradient_accumulation_steps is 4, which can mean 4 separate losses on 24 samples, or one on 96. exact() "
        "computes one: set per_device_train_batch_size=96 and gradient_accumulation_steps=1, and exact(trainer, "
        "microbatch=24) needs the memory of 24 samples."
    )


def test_accumulation_steps_are_refused_later(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, cases.rows(48))
    exact(trainer, microbatch=5)
    trainer.args.gradient_accumulation_steps = 2
    with pytest.raises(bigbatch.InputError, match="gradient_accumulation_steps is 2, which can mean 2 separate losses"):
        trainer.train()


def test_automatic_batch_size_is_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, cases.rows(48), auto_find_batch_size=True)
    assert refusal(trainer) == (
        "auto_find_batch_size=True makes the batch of the loss smaller when memory runs out: set it to False; exact() "
        "makes the micro-batches smaller instead."
    )


@pytest.mark.parametrize("microbatch", [True, 8.0, "8", bigbatch.TokenBudget(100)], ids=str)
def test_other_micro_batch_is_refused(tmp_path: Path, microbatch: Any):
    trainer, _ = cases.make(tmp_path, cases.rows(48))
    assert refusal(trainer, microbatch=microbatch) == (
        f'microbatch is {microbatch!r}: it must be "auto", or a number of samples that are embedded at once, with all '
        "of their columns."
    )


def test_settings_out_of_range_are_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, cases.rows(48))
    assert refusal(trainer, microbatch=0) == "microbatch is 0: it must be at least 1, the samples of one micro-batch."
    assert refusal(trainer, microbatch=8, memory="1GiB") == (
        "memory='1GiB' chooses the micro-batch, and microbatch=8 is fixed: pass microbatch=\"auto\", or leave memory= "
        "out."
    )


def test_other_object_is_refused():
    assert refusal(nn.Linear(1, 1)) == (
        "trainer is a Linear: pass a SentenceTransformerTrainer, or an instance of a subclass. For other trainers, see "
        "bigbatch.integrations.transformers and bigbatch.Coupled."
    )


def test_second_call_changes_nothing(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, cases.rows(48))
    exact(trainer, microbatch=8)
    kind = type(trainer)
    assert exact(exact(trainer), microbatch=8) is trainer
    assert type(trainer) is kind
    assert refusal(trainer, microbatch=4) == (
        "exact() was called before on this SentenceTransformerTrainer with other settings "
        "(CoupledSettings(microbatch=8, memory=None)): make another trainer, and pass all settings in the first call."
    )


def test_exact_of_both_packages_is_refused(tmp_path: Path):
    one, _ = cases.make(tmp_path, cases.rows(48))
    two, _ = cases.make(tmp_path, cases.rows(48))
    sentence = (
        "exact() of bigbatch.integrations.{} was called on this SentenceTransformerTrainer, and that of "
        "bigbatch.integrations.{} computes its windows in another way: leave this call out, or make another trainer "
        "for it."
    )
    exact(one)
    with pytest.raises(bigbatch.InputError) as caught:
        for_transformers.exact(one)
    assert str(caught.value) == sentence.format("sentence_transformers", "transformers")
    assert refusal(for_transformers.exact(two)) == sentence.format("transformers", "sentence_transformers")
    with pytest.raises(bigbatch.InputError, match="weights micro-batches by their items, and the loss of this Sent"):
        for_transformers.verify(one)


def test_weighted_trainer_is_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, cases.rows(48))
    for_transformers.weights(trainer, items=len)
    assert refusal(trainer) == (
        "weights() was called on this SentenceTransformerTrainer, which weights whole batches: make another trainer "
        "for exact()."
    )


def test_call_during_training_is_refused(tmp_path: Path):
    class Late(TrainerCallback):
        def on_step_begin(self, *_, **__):
            exact(trainer)

    trainer, _ = cases.make(tmp_path, cases.rows(48), callbacks=[Late()])
    with pytest.raises(bigbatch.InputError) as caught:
        trainer.train()
    assert str(caught.value) == (
        "exact() was called while SentenceTransformerTrainer.train() runs, or after it failed: call it before train(), "
        "on another trainer if this one failed."
    )


def test_call_after_training_is_exact(tmp_path: Path):
    trainer, found = cases.make(tmp_path, cases.rows(48))
    trainer.train()
    exact(trainer, microbatch=5).train()
    stock, wanted = cases.make(tmp_path, cases.rows(48))
    stock.train()
    stock.train()
    assert max(cases.errors(found, wanted)) <= 1e-12


def test_second_model_is_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, cases.rows(48, ("text",)), losses.ContrastiveTensionLossInBatchNegatives)
    assert refusal(trainer) == (
        "ContrastiveTensionLossInBatchNegatives trains a second model on the same columns: use "
        "MultipleNegativesRankingLoss with each text in two columns, or train without exact()."
    )


def test_loss_of_another_model_is_refused(tmp_path: Path):
    other = cases.model(seed=3)
    trainer, _ = cases.make(tmp_path, cases.rows(24), lambda _: losses.MultipleNegativesRankingLoss(other))
    assert refusal(trainer) == (
        "MultipleNegativesRankingLoss has a model of its own (model), and exact() embeds with the trainer's: make the "
        "loss with the model that the trainer has, or embed with the other one ahead and pass its embeddings as "
        "labels."
    )


class _Loss(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.others = [model]


class _ReadsMask(_Loss):
    def forward(self, features: Any, labels: Any) -> Any:
        return self.model(features[0])["sentence_embedding"].mean() * features[0]["attention_mask"].sum()


class _MayReadMask(_Loss):
    def forward(self, features: Any, labels: Any) -> Any:
        mask = features[0].get("attention_mask")
        return self.model(features[0])["sentence_embedding"].mean() * (1 if mask is None else mask.sum())


class _ReadsTokens(_Loss):
    def forward(self, features: Any, labels: Any) -> Any:
        return self.model(features[0])["token_embeddings"].mean()


class _EmbedsTwice(_Loss):
    def forward(self, features: Any, labels: Any) -> Any:
        one, two = (self.model(features[0])["sentence_embedding"] for _ in range(2))
        return F.mse_loss(one, two)


class _Encodes(_Loss):
    def forward(self, features: Any, labels: Any) -> Any:
        known = self.model.encode(["w1"], convert_to_tensor=True)
        return F.mse_loss(self.model(features[0])["sentence_embedding"].mean(0, keepdim=True), known)


class _HidesModel(_Loss):
    def forward(self, features: Any, labels: Any) -> Any:
        return self.others[0](features[0])["sentence_embedding"].mean()


class _PassesOptions(_Loss):
    def forward(self, features: Any, labels: Any) -> Any:
        return self.model(features[0], task="query")["sentence_embedding"].mean()


READS = (
    "the loss reads {!r} of {}, and exact() knows only the sentence_embedding of each column and the labels: compute "
    "the loss from these, or train without exact()."
)
CALLS = (
    "the loss calls the model with {} than the columns of the dataset, which exact() embeds in micro-batches: compute "
    "it from model(features)['sentence_embedding'] of each column, or train without exact()."
)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (_ReadsMask, READS.format("attention_mask", "the features of a column")),
        (_MayReadMask, READS.format("attention_mask", "the features of a column")),
        (_ReadsTokens, READS.format("token_embeddings", "the output of the model")),
        (
            _EmbedsTwice,
            "the loss calls the model twice on column 1, which draws dropout twice, and exact() embeds each column "
            "once: put the text into two columns of the dataset.",
        ),
        (_Encodes, CALLS.format("other inputs")),
        (_PassesOptions, CALLS.format("the options ['task']")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_loss_of_more_than_embeddings_is_refused(tmp_path: Path, loss: cases.Loss, message: str):
    trainer, recorder = cases.make(tmp_path, cases.rows(24), loss)
    assert refusal(trainer, trains=True) == message
    assert not recorder.gradients
    assert trainer.loss.model is trainer.model


def test_loss_that_hides_its_model_is_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, cases.rows(24), _HidesModel)
    assert "of the features of a column, and exact() knows only the sentence_embedding" in refusal(trainer, trains=True)


class _ReadsInputs(SentenceTransformerTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert "anchor_input_ids" in inputs
        return super().compute_loss(model, inputs)


def test_compute_loss_that_reads_tokens_is_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, cases.rows(24), kind=_ReadsInputs)
    assert refusal(trainer, trains=True) == READS.format("anchor_input_ids", "the inputs")


def test_unused_column_of_cached_loss_is_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, cases.rows(24, ("a", "p", "n")), losses.MegaBatchMarginLoss)
    assert refusal(trainer, trains=True) == (
        "MegaBatchMarginLoss does not use column 3 of the dataset: remove it, or use another loss."
    )


def test_single_column_of_cached_loss_is_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, cases.rows(24, ("a",)), losses.CachedMultipleNegativesRankingLoss)
    assert refusal(trainer, trains=True) == (
        "CachedMultipleNegativesRankingLoss needs at least 2 columns of texts, and the dataset has 1."
    )


def test_cached_loss_with_parameters_is_refused(tmp_path: Path):
    class Learned(losses.CachedMultipleNegativesRankingLoss):
        def __init__(self, model: Any) -> None:
            super().__init__(model)
            self.bias = nn.Parameter(torch.zeros(()))

    trainer, _ = cases.make(tmp_path, cases.rows(24), Learned)
    assert refusal(trainer, trains=True) == (
        "Learned has parameters of its own (bias), whose gradient it adds block by block: use the loss without "
        "gradient cache, whose memory exact() limits as well."
    )


class _Collates(SentenceTransformerTrainer):
    own_collator: Any = None

    def get_train_dataloader(self):
        return [self.own_collator([dict(row) for row in self.train_dataset])]


def test_collated_batches_are_refused(tmp_path: Path):
    trainer, _ = cases.make(tmp_path, cases.rows(24), kind=_Collates)
    trainer.own_collator = trainer.data_collator
    assert refusal(trainer, trains=True) == (
        "the train dataloader of _Collates yields batches that are collated already, which cannot be cut into "
        "micro-batches: collate with self.data_collator in get_train_dataloader."
    )


def test_mixed_datasets_in_a_batch_are_refused(tmp_path: Path):
    rows = cases.rows(24)
    trainer, _ = cases.make(tmp_path, rows)
    trainer.train_dataset = rows.add_column("dataset_name", [f"d{number % 2}" for number in range(24)])
    assert refusal(trainer, trains=True) == (
        "a batch has samples of several datasets (d0, d1), whose losses may differ: use a batch sampler whose batches "
        "are of one dataset."
    )
