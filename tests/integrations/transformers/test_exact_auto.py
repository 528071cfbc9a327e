"""With items="auto" every update has the gradient of its whole batch, whatever the loss is averaged over."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from bigbatch.integrations.transformers import exact
from integrations.transformers import trainer_cases as cases
from integrations.transformers.test_exact_modes import llama, own_loss, pad, texts
from support import full_batch_reference as ref

EXACT = 1e-12
EXACT_IN_FLOAT32_LOGITS = 1e-6


def test_overridden_mean_is_exact(tmp_path: Path):
    trainer, recorder = cases.make(tmp_path)
    exact(trainer).train()
    assert max(cases.errors(recorder, ref.make_model(), cases.windows(trainer.train_dataset))) <= EXACT


def test_batches_of_own_loader_are_exact(tmp_path: Path):
    class OwnLoader(cases.MeanLoss):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, 5, collate_fn=cases.collate)

    trainer, recorder = cases.make(tmp_path, OwnLoader, dataset=cases.samples(33))
    exact(trainer).train()
    parts = cases.windows(trainer.train_dataset, size=5 * cases.STEPS)
    assert max(cases.errors(recorder, ref.make_model(), parts)) <= EXACT


@pytest.mark.parametrize("settings", [{}, {"label_smoothing_factor": 0.1}, {"microbatch": 5}])
def test_language_model_is_exact(tmp_path: Path, settings):
    arguments = {k: v for k, v in settings.items() if k != "microbatch"}
    trainer, recorder = cases.make(tmp_path, Trainer, llama(), texts(), pad, **arguments)
    exact(trainer, **{k: v for k, v in settings.items() if k == "microbatch"}).train()
    loss = own_loss if not arguments else _smoothed(trainer)
    assert max(cases.errors(recorder, llama(), cases.windows(texts(), pad), loss)) <= EXACT_IN_FLOAT32_LOGITS


def test_columns_that_the_model_does_not_take_are_removed(tmp_path: Path):
    rows = [{**row, "source": "somewhere"} for row in texts()]
    seen = set()

    def collate(samples):
        seen.update(name for sample in samples for name in sample)
        return pad(samples)

    trainer, recorder = cases.make(tmp_path, Trainer, llama(), rows, collate, remove_unused_columns=True)
    exact(trainer).train()
    assert seen == {"input_ids"}
    assert max(cases.errors(recorder, llama(), cases.windows(texts(), pad), own_loss)) <= EXACT_IN_FLOAT32_LOGITS


def _smoothed(trainer):
    def loss(model: LlamaForCausalLM, batch):
        outputs = model(**{name: batch[name] for name in ("input_ids", "attention_mask")})
        return trainer.label_smoother(outputs, batch["labels"], shift_labels=True)

    return loss


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=19,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).double()


def test_classifier_is_exact(tmp_path: Path):
    def collate(rows):
        batch = pad(rows)
        return {**batch, "labels": torch.tensor([len(row["input_ids"]) % 3 for row in rows])}

    trainer, recorder = cases.make(tmp_path, Trainer, bert(), texts(), collate)
    exact(trainer).train()
    assert max(cases.errors(recorder, bert(), cases.windows(texts(), collate), own_loss)) <= EXACT


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=19,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).double()


def test_encoder_decoder_is_exact(tmp_path: Path):
    recorder = cases.Recorder()
    arguments = cases.arguments(tmp_path, Seq2SeqTrainingArguments)
    trainer = Seq2SeqTrainer(t5(), arguments, data_collator=pad, train_dataset=texts(), callbacks=[recorder])
    exact(trainer).train()
    errors = cases.errors(recorder, t5(), cases.windows(texts(), pad), own_loss)
    assert max(errors) <= EXACT_IN_FLOAT32_LOGITS
