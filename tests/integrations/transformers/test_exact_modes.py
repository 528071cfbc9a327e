"""Exact updates with the ways to save memory and time that a Trainer has, and with those of the engine."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

import bigbatch
from bigbatch.integrations.transformers import exact
from integrations.transformers import trainer_cases as cases
from support import full_batch_reference as ref

EXACT = 1e-12
EXACT_IN_FLOAT32_LOGITS = 1e-6


def llama(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype)


def texts(number: int = cases.NUM_SAMPLES) -> cases.Samples:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (number,), generator=generator).tolist()
    return [{"input_ids": torch.randint(1, 19, (length,), generator=generator)} for length in lengths]


def pad(rows):
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    mask = (ids > 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def num_targets(inputs) -> int:
    return int((inputs["labels"][:, 1:] != -100).sum())


def own_loss(model, batch):
    return model(**batch).loss


def make(folder: Path, model: nn.Module, **settings):
    return cases.make(folder, Trainer, model, texts(), pad, **settings)


def run(trainer, recorder, model: nn.Module, **settings) -> list[float]:
    exact(trainer, **{"items": num_targets, **settings}).train()
    return cases.errors(recorder, model, cases.windows(texts(), pad), own_loss)


def lengths_of(rows):
    return [len(row["input_ids"]) for row in rows]


def test_memory_that_runs_out_three_times_leaves_update_exact(tmp_path: Path):
    fails = [0, 1, 4]  # calls of the last layer's backward; the first two are of one micro-batch, and of it again
    calls = []

    def run_out(*_) -> None:
        calls.append(None)
        if len(calls) - 1 in fails:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer, recorder = cases.make(tmp_path)
    trainer.model.hidden.register_full_backward_pre_hook(run_out)
    retries = []
    exact(trainer, items=cases.num_labels)
    recorder.on_step_end = lambda *_, **__: retries.append(trainer.bigbatch_report.retries)
    trainer.train()
    assert retries == [3, 0, 0]
    assert max(cases.errors(recorder, ref.make_model(), cases.windows(trainer.train_dataset))) <= EXACT


@pytest.mark.parametrize("with_lengths", [False, True])
def test_micro_batches_for_memory_are_exact(tmp_path: Path, with_lengths: bool):
    trainer, recorder = cases.make(tmp_path)
    lengths = (lambda rows: [len(row["tokens"]) for row in rows]) if with_lengths else None
    seen = []
    trainer.seen = seen

    def compute_loss(model, inputs, **_):
        seen.append(None)
        return ref.loss_mean(model, inputs)

    trainer.compute_loss = compute_loss
    exact(trainer, items=cases.num_labels, memory="4GiB", lengths=lengths).train()
    assert max(cases.errors(recorder, ref.make_model(), cases.windows(trainer.train_dataset))) <= EXACT
    assert len(seen) == trainer.bigbatch_report.num_microbatches * 3  # trials leave no trace on the trainer
    tokens = sum(len(row["tokens"]) for row in trainer.train_dataset[24:])
    assert trainer.bigbatch_report.tokens == (tokens if with_lengths else None)


def test_language_model_is_exact(tmp_path: Path):
    assert max(run(*make(tmp_path, llama()), llama())) <= EXACT_IN_FLOAT32_LOGITS


def test_token_budget_is_exact(tmp_path: Path):
    settings = {"microbatch": bigbatch.TokenBudget(30), "lengths": lengths_of}
    assert max(run(*make(tmp_path, llama()), llama(), **settings)) <= EXACT_IN_FLOAT32_LOGITS


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_is_exact(tmp_path: Path, use_reentrant: bool):
    trainer, recorder = make(
        tmp_path,
        llama(),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    assert max(run(trainer, recorder, llama())) <= EXACT_IN_FLOAT32_LOGITS
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())


def lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.0)
    return get_peft_model(llama(), config).double()


def test_adapters_are_exact(tmp_path: Path):
    trainer, recorder = make(tmp_path, lora())
    assert max(run(trainer, recorder, lora())) <= EXACT_IN_FLOAT32_LOGITS
    assert all("lora" in name for gradients in recorder.gradients for name in gradients)


def test_compiled_model_is_exact(tmp_path: Path):
    trainer, recorder = cases.make(tmp_path, torch_compile=True, torch_compile_backend="eager")
    exact(trainer, items=cases.num_labels).train()
    prefix = "_orig_mod."
    recorder.gradients = [{n.removeprefix(prefix): g for n, g in each.items()} for each in recorder.gradients]
    recorder.weights = [{n.removeprefix(prefix): w for n, w in each.items()} for each in recorder.weights]
    assert max(cases.errors(recorder, ref.make_model(), cases.windows(trainer.train_dataset))) <= EXACT


def test_bfloat16_autocast_stays_within_its_precision(tmp_path: Path):
    errors = []
    for settings in ({"bf16": True}, {}):
        trainer, recorder = make(tmp_path, llama(torch.float32), **settings)
        errors.append(max(run(trainer, recorder, llama(torch.float32))))
    assert 1e-4 < errors[0] < 0.02  # 2 ** -8 = 0.004 for each operation
    assert errors[1] <= EXACT_IN_FLOAT32_LOGITS


def test_bfloat16_weights_sum_in_float32(tmp_path: Path):
    trainer, recorder = make(tmp_path, llama(torch.bfloat16))
    exact(trainer, items=num_targets).train()
    assert all(g.dtype == torch.bfloat16 for gradients in recorder.gradients for g in gradients.values())


def test_neftune_noise_reaches_the_model(tmp_path: Path):
    trainer, recorder = make(tmp_path, llama(), neftune_noise_alpha=5.0)
    errors = run(trainer, recorder, llama())
    assert min(errors) > EXACT_IN_FLOAT32_LOGITS


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_on_gpu(tmp_path: Path, precision: str):
    trainer, recorder = make(
        tmp_path, llama(torch.float32).cuda(), use_cpu=False, max_grad_norm=1e6, **{precision: True}
    )
    exact(trainer, items=num_targets, memory="2GiB", lengths=lengths_of).train()
    gradients = [{n: g.cpu() for n, g in each.items()} for each in recorder.gradients]
    finite = [index for index, each in enumerate(gradients) if all(g.isfinite().all() for g in each.values())]
    recorder.gradients = [gradients[index] for index in finite]
    recorder.weights = [{n: w.cpu() for n, w in recorder.weights[index].items()} for index in finite]
    parts = cases.windows(texts(), pad)
    errors = cases.errors(recorder, llama(torch.float32), [parts[index] for index in finite], own_loss)
    assert errors
    assert max(errors) < (0.005 if precision == "fp16" else 0.03)
