"""What a Trainer does around its updates stays as it was: counters, events, logs, resume, evaluation, skips."""

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback

import bigbatch
from bigbatch.integrations.transformers import exact
from integrations.transformers import trainer_cases as cases
from support import full_batch_reference as ref

TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime"}
RATES = {"eval_samples_per_second", "eval_steps_per_second"}


def make_pair(folder: Path, **settings):
    """Return a stock trainer and an exact one, with their recorders."""
    stock, exact_one = cases.make(folder / "stock", **settings), cases.make(folder / "exact", **settings)
    exact(exact_one[0], items=cases.num_labels)
    return stock, exact_one


@pytest.mark.parametrize("number", [31, 24, 26])
def test_events_are_those_of_stock_trainer(tmp_path: Path, number: int):
    (stock, events), (trainer, found) = make_pair(tmp_path, dataset=cases.samples(number), num_train_epochs=2)
    stock.train()
    trainer.train()
    assert found.events == events.events
    assert [name for name, *_ in found.events].count("substep_end") > 0


def test_logs_have_same_entries_and_exact_losses(tmp_path: Path):
    (stock, _), (trainer, recorder) = make_pair(tmp_path, learning_rate=0.0)
    stock.train()
    trainer.train()
    expected, found = stock.state.log_history, trainer.state.log_history
    assert [entry.keys() for entry in found] == [entry.keys() for entry in expected]
    assert [(entry["step"], entry["epoch"]) for entry in found] == [(e["step"], e["epoch"]) for e in expected]
    model = ref.make_model()
    losses = [ref.loss_mean(model, batch).item() for batch in cases.windows(trainer.train_dataset)]
    assert [entry["loss"] for entry in found[:-1]] == pytest.approx(losses, rel=1e-6)  # logged in float32
    assert found[-1]["train_loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    norms = [sum(g.square().sum() for g in gradients.values()).sqrt() for gradients in recorder.gradients]
    assert [entry["grad_norm"] for entry in found[:-1]] == pytest.approx([float(norm) for norm in norms])


@pytest.mark.parametrize("rule", ["all", "non_padding"])
def test_token_and_operation_counts_are_those_of_stock_trainer(tmp_path: Path, rule: str):
    counts = []
    for is_exact in (False, True):
        model = _gpt2()
        trainer, _ = cases.make(
            tmp_path, Trainer, model, _texts(), collator=_pad, include_num_input_tokens_seen=rule, num_train_epochs=2
        )
        if is_exact:
            exact(trainer, items=lambda inputs: int((inputs["labels"][:, 1:] != -100).sum()))
        trainer.train()
        counts.append((trainer.state.num_input_tokens_seen, trainer.state.total_flos))
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0


def test_memory_retries_count_tokens_once(tmp_path: Path):
    totals = []
    for fails in (0, 3):
        trainer, _ = cases.make(
            tmp_path, Trainer, _gpt2(fails), _texts(), collator=_pad, include_num_input_tokens_seen="non_padding"
        )
        exact(trainer, items=lambda inputs: int((inputs["labels"][:, 1:] != -100).sum())).train()
        totals.append(trainer.state.num_input_tokens_seen)
    assert totals[0] == totals[1]


def _gpt2(fails: int = 0) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=17, n_positions=16, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = GPT2LMHeadModel(config)
    left = [fails]

    def run_out(*_) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.transformer.h[0].register_forward_hook(run_out)
    return model


def _texts() -> cases.Samples:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(1, 17, (int(length),), generator=generator)}
        for length in torch.randint(2, 12, (31,), generator=generator)
    ]


def _pad(rows):
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    mask = (ids > 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class DroppingModel(nn.Module):
    """Draws random numbers in training."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ref.make_model()

    def forward(self, tokens):
        return nn.functional.dropout(self.inner(tokens), 0.2, self.training)


def test_resume_within_epoch_is_bitwise(tmp_path: Path):
    settings = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "optim": "adamw_torch"}
    settings |= {"model": DroppingModel(), "train_sampling_strategy": "random", "weight_decay": 0.1}
    whole, _ = cases.make(tmp_path / "whole", **settings)
    exact(whole, items=cases.num_labels).train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed, _ = cases.make(tmp_path / "resumed", **{**settings, "model": DroppingModel()})
    exact(resumed, items=cases.num_labels).train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 6
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    states = [json.loads((tmp_path / run / "checkpoint-6" / "trainer_state.json").read_text()) for run in _RUNS]
    assert states[0]["log_history"][:6] == states[1]["log_history"][:6]


_RUNS = ("whole", "resumed")


def test_evaluation_during_training_is_that_of_stock_trainer(tmp_path: Path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0, "per_device_eval_batch_size": 3}
    settings["label_names"] = ["labels"]
    entries = []
    for is_exact in (False, True):
        each, _ = cases.make(tmp_path, eval_dataset=cases.samples(7, seed=5), **settings)
        if is_exact:
            exact(each, items=cases.num_labels)
        each.train()
        entries.append([e for e in each.state.log_history if "eval_loss" in e])
    assert len(entries[1]) == 3
    for expected, found in zip(*entries, strict=True):
        assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-12)


def test_collator_and_scaling_are_restored(tmp_path: Path):
    trainer, _ = cases.make(tmp_path)
    exact(trainer, items=cases.num_labels).train()
    assert trainer.data_collator is cases.collate
    assert trainer.accelerator.dataloader_config.dispatch_batches is None
    assert "compute_loss" not in vars(trainer)
    assert trainer.current_gradient_accumulation_steps == 2  # of the last window


def test_second_training_continues(tmp_path: Path):
    trainer, recorder = cases.make(tmp_path)
    exact(trainer, items=cases.num_labels)
    trainer.train()
    trainer.train()
    parts = cases.windows(trainer.train_dataset) * 2
    assert max(cases.errors(recorder, ref.make_model(), parts)) <= 1e-12


def test_smaller_batches_after_out_of_memory_are_exact(tmp_path: Path):
    trainer, recorder = cases.make(tmp_path, auto_find_batch_size=True, optim="sgd")
    left = [1]

    def run_out(*_, **__) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise RuntimeError("CUDA out of memory.")

    trainer.add_callback(type("Fails", (TrainerCallback,), {"on_train_begin": run_out}))
    exact(trainer, items=cases.num_labels).train()
    size = trainer._train_batch_size * cases.STEPS
    assert size < cases.BATCH * cases.STEPS
    parts = cases.windows(trainer.train_dataset, size=size)
    assert max(cases.errors(recorder, ref.make_model(), parts)) <= 1e-12


class SometimesNaN(cases.MeanLoss):
    """Its loss is NaN in the second window."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs)
        return loss * float("nan") if self.state.global_step == 1 else loss


def _weights_after(folder: Path, kind: type[Trainer], **settings):
    weights = []

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            weights.append(ref.parameters_of(model))

    trainer, _ = cases.make(folder, kind, optim="adamw_torch", callbacks=[Note()], max_grad_norm=1.0)
    return exact(trainer, items=cases.num_labels, **settings), weights


def test_nonfinite_window_changes_nothing_and_warns(tmp_path: Path):
    trainer, weights = _weights_after(tmp_path, SometimesNaN)
    message = (
        "the window of update 2 has a non-finite gradient: it changes no weight and no optimizer state; the learning "
        "rate schedule goes on."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        trainer.train()
    assert ref.relative_error(weights[1], weights[0]) == 0
    assert 0 < ref.relative_error(weights[2], weights[1]) < 1
    (step,) = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert step == 2


def test_nonfinite_window_can_raise(tmp_path: Path):
    trainer, _ = _weights_after(tmp_path, SometimesNaN, nonfinite="raise")
    with pytest.raises(
        bigbatch.NonFiniteError, match=r"^the window after update 1 has a non-finite gradient, and changed"
    ):
        trainer.train()


def test_window_without_items_changes_nothing_and_warns(tmp_path: Path):
    trainer, weights = _weights_after(tmp_path, cases.MeanLoss)
    for row in trainer.train_dataset[12:24]:
        row["labels"] = torch.full_like(row["labels"], ref.IGNORED)
    with pytest.warns(UserWarning, match=r"^the window of update 2 has no items: it changes no weight"):
        trainer.train()
    assert ref.relative_error(weights[1], weights[0]) == 0


def test_grad_scaler_skips_nonfinite_window(tmp_path: Path):
    trainer, weights = _weights_after(tmp_path, SometimesNaN)
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.native_amp = True
    with warnings.catch_warnings(action="ignore"):  # of the scheduler, about a skipped first step
        trainer.train()
    assert ref.relative_error(weights[1], weights[0]) == 0
    assert ref.relative_error(weights[2], weights[1]) > 0
    assert scaler.get_scale() == 512.0


def test_grad_scaler_leaves_gradients_exact(tmp_path: Path):
    trainer, recorder = cases.make(tmp_path, max_grad_norm=1e6)  # clipping unscales
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.native_amp = True
    exact(trainer, items=cases.num_labels).train()
    errors = cases.errors(recorder, ref.make_model(), cases.windows(trainer.train_dataset))
    assert max(errors) <= 1e-12


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_batch_norm_is_warned_of(tmp_path: Path, dropout: float):
    model = ref.make_model()
    model.hidden = nn.Sequential(model.hidden, nn.Dropout(dropout))
    model.unused = nn.BatchNorm1d(3).double()
    trainer, _ = cases.make(tmp_path, model=model)
    with pytest.warns(UserWarning, match=r"BatchNorm in training mode \(unused.*normalizes by the mean"):
        exact(trainer, items=cases.num_labels).train()


@pytest.mark.parametrize("draws", [False, True])
def test_samples_of_one_length_are_collated_once(tmp_path: Path, draws: bool):
    """Labels, positions and samples then count alike, and every window is counted in all of them."""
    batch = ref.ragged_batch(12 * cases.STEPS, seed=0)
    whole = [{"tokens": row, "labels": row} for row in batch["tokens"]]
    numbers: list[int] = []

    def collator(rows):
        numbers.append(len(rows))
        if draws:
            torch.rand(1)
        return cases.collate(rows)

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            counts.append(sum(numbers))
            numbers.clear()

    counts: list[int] = []
    trainer, recorder = cases.make(tmp_path, dataset=whole, collator=collator, callbacks=[Count()], num_train_epochs=3)
    exact(trainer).train()
    assert len(trainer._bigbatch_windows.unit._finders[False]._decision.fitting) > 1
    after_audits = [count for number, count in enumerate(counts, 1) if number > 4 and number != 8]
    assert min(after_audits) > 12 if draws else set(after_audits) == {12}
    expected = cases.windows(whole) * 3
    assert max(cases.errors(recorder, ref.make_model(), expected)) <= 1e-12
