"""The training loop: the same update for every micro-batch, honest metrics, a model folder that loads."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bigbatch.errors import BigbatchError, InputError
from bigbatch.lm.config.field_types import CHECKPOINTING_MODES
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.runs.samples import Sample, read_samples
from bigbatch.lm.training.evaluation import evenly_spaced
from bigbatch.lm.training.optimizer import lr_factor
from bigbatch.lm.training.setup import set_up_training
from bigbatch.lm.training.trainer import Trainer
from bigbatch.lm.training.tuning_cache import CachedChoice, cache_key, load_cached
from support.language_models import (
    RecordingCallback,
    conversations,
    load_peft,
    metrics,
    records,
    run,
    save_model_folder,
    write_jsonl,
)
from support.tiers import slow

KEYS = {
    "step", "loss", "items", "grad_norm", "lr", "num_microbatches", "tokens", "tokens_per_s", "peak_bytes",
    "elapsed_s", "skipped", "sequences", "noise_scale_items",
}  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "data": str(write_jsonl(tmp_path / "data.jsonl", records(40))),
        "model": str(save_model_folder(tmp_path / "base")),
        "global_batch": 12,
        "microbatch": 8,
        "steps": 3,
        "lr": 1e-2,
        "max_length": 32,
    }


def parameters(prepared: Any) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in prepared.model.parameters()])


def test_every_microbatch_gives_same_parameters(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings |= {"precision": "float64", "max_grad_norm": 0.5, "warmup_steps": 2}
    runs = {size: run(tmp_path / f"run{size}", **settings | {"microbatch": size}) for size in (1, 3, 8, 100)}
    expected = parameters(runs[100][0])
    for size, (prepared, recorder, _) in runs.items():
        assert torch.linalg.norm(parameters(prepared) - expected) / torch.linalg.norm(expected) < 1e-10
        assert [row["num_microbatches"] for row in recorder.rows] == [math.ceil(12 / size)] * 3
        assert [row["loss"] for row in recorder.rows] == pytest.approx(
            [row["loss"] for row in runs[100][1].rows], rel=1e-9
        )


def test_epoch_uses_every_sequence_with_partial_last_window(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings |= {"steps": None, "epochs": 1, "validation_fraction": 0.0}
    prepared, recorder, outcome = run(tmp_path / "run", **settings)
    assert outcome.step == len(recorder.rows) == 4  # 40 sequences: 12 + 12 + 12 + 4
    assert sum(row["items"] for row in recorder.rows) == sum(prepared.training.label_counts)
    assert sum(row["tokens"] for row in recorder.rows) == sum(prepared.training.lengths)
    assert recorder.rows[-1]["num_microbatches"] == 1


def test_token_batch_takes_nearest_whole_sequences(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings |= {"global_batch": None, "global_batch_tokens": 100}
    prepared, recorder, _ = run(tmp_path / "run", **settings)
    longest = max(prepared.training.lengths)
    assert all(abs(row["tokens"] - 100) <= longest / 2 for row in recorder.rows)


def test_metrics_have_one_documented_line_per_update(tmp_path: Path, settings: dict[str, Any]) -> None:
    _, recorder, outcome = run(tmp_path / "run", **settings, validation_every=2)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    validation = {"validation_loss", "validation_perplexity"}
    assert [row.keys() - KEYS for row in rows] == [set(), validation, validation]
    assert rows[1]["validation_perplexity"] == math.exp(rows[1]["validation_loss"])
    assert all(row.keys() >= KEYS for row in rows)
    assert [row["skipped"] for row in rows] == [None] * 3
    assert rows == recorder.rows
    assert outcome.validation_loss == rows[-1]["validation_loss"] == recorder.validations[-1][1]
    assert [step for step, _ in recorder.samples] == [1, 3]
    prompt = TrainConfig().prompt(is_chat=False)
    assert read_samples(tmp_path / "run") == [Sample(step, prompt, text) for step, text in recorder.samples]


def test_learning_rate_follows_updates(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings |= {"steps": 6, "warmup_steps": 2}
    rates = {
        size: [row["lr"] for row in run(tmp_path / f"{size}", **settings | {"microbatch": size})[1].rows]
        for size in (2, 12)
    }
    assert rates[2] == rates[12] == pytest.approx([0.01 * f for f in (1 / 3, 2 / 3, 1, 0.775, 0.325, 0.1)])


def test_constant_schedule_is_flat_after_warmup() -> None:
    factors = [lr_factor(step, total_steps=5, warmup_steps=1, schedule="constant", final=1.0) for step in range(5)]
    assert factors == [0.5, 1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_saved_model_is_the_trained_one(tmp_path: Path, settings: dict[str, Any], kind: str, lora_rank: int) -> None:
    base = save_model_folder(tmp_path / kind, kind=kind)
    before = (base / "model.safetensors").read_bytes()
    prepared, _, _ = run(tmp_path / "run", **settings | {"model": str(base), "lora_rank": lora_rank})
    saved = tmp_path / "run" / ("adapter" if lora_rank else "model")
    loaded = load_peft(base, saved) if lora_rank else AutoModelForCausalLM.from_pretrained(saved)
    tokens = AutoTokenizer.from_pretrained(saved)("def für 日本語", return_tensors="pt")
    with torch.no_grad():
        expected = prepared.model.eval()(input_ids=tokens["input_ids"]).logits
        assert torch.allclose(loaded.eval()(input_ids=tokens["input_ids"]).logits, expected, atol=1e-5)
        untrained = AutoModelForCausalLM.from_pretrained(base).eval()(input_ids=tokens["input_ids"]).logits
    assert not torch.allclose(untrained, expected, atol=1e-3)
    assert (base / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-weights", torch.bfloat16), ("float64", torch.float64), ("bf16", torch.float32)]
)
def test_every_precision_trains_and_saves_its_weights(
    tmp_path: Path, settings: dict[str, Any], precision: str, dtype: torch.dtype
) -> None:
    prepared, recorder, _ = run(tmp_path / "run", **settings, precision=precision)
    assert recorder.rows[-1]["loss"] < recorder.rows[0]["loss"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert loaded.dtype == dtype
    trained = dict(prepared.model.named_parameters())
    assert all(torch.equal(parameter, trained[name]) for name, parameter in loaded.named_parameters())


def test_float16_trains_with_its_scaler(tmp_path: Path, settings: dict[str, Any]) -> None:
    _, recorder, _ = run(tmp_path / "run", **settings, precision="fp16")
    assert [row["skipped"] for row in recorder.rows] == [None] * 3


def test_validation_and_samples_do_not_affect_training(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings["model"] = str(save_model_folder(tmp_path / "dropping", kind="gpt2", dropout=0.2))
    often, rare = (run(tmp_path / f"{n}", **settings, validation_every=n)[0] for n in (1, 3))
    assert torch.equal(parameters(often), parameters(rare)), "dropout drew other masks"
    assert often.model.training


def test_seed_determines_run(tmp_path: Path, settings: dict[str, Any]) -> None:
    once, again, other = (run(tmp_path / f"run{i}", **settings, seed=seed)[1].rows for i, seed in enumerate((1, 1, 2)))
    clock = {"elapsed_s", "tokens_per_s", "peak_bytes"}
    plain = [[{k: v for k, v in row.items() if k not in clock} for row in rows] for rows in (once, again, other)]
    assert plain[0] == plain[1] != plain[2]


def test_stopped_run_saves_its_model(tmp_path: Path, settings: dict[str, Any]) -> None:
    recorder = RecordingCallback()
    directory = RunDirectory.create(tmp_path / "run", {})
    outcome = Trainer(set_up_training(TrainConfig(**settings))).run(
        directory, callback=recorder, should_stop=lambda: len(recorder.rows) == 1
    )
    assert (outcome.step, outcome.finished) == (1, False)
    assert len(metrics(tmp_path / "run")) == 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.vocab_size


def test_conversations_train_on_assistant_turns(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "chat.jsonl", conversations(20))
    prepared, recorder, _ = run(tmp_path / "run", data=str(data), steps=2, global_batch=4, microbatch=2, max_length=128)
    assert 0 < recorder.rows[0]["items"] < recorder.rows[0]["tokens"]
    assert recorder.rows[0]["items"] <= max(prepared.training.label_counts) * 4


def test_evenly_spaced_indices_span_whole_set() -> None:
    assert evenly_spaced(3, 5) == [0, 1, 2]
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]


def test_every_document_is_used_once_per_epoch(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings |= {"steps": None, "epochs": 2, "validation_fraction": 0.0, "global_batch": 7}
    trainer = Trainer(set_up_training(TrainConfig(**settings)))
    windows = list(trainer.schedule.windows(0, 0))
    assert trainer.total_steps == len(windows) == 12
    assert [len(window) for window in windows] == [7, 7, 7, 7, 7, 5] * 2
    used = [[i for window in windows[start : start + 6] for i in window] for start in (0, 6)]
    assert sorted(used[0]) == sorted(used[1]) == list(range(40))
    assert used[0] != used[1]


def test_warmup_longer_than_run_is_rejected(settings: dict[str, Any]) -> None:
    prepared = set_up_training(TrainConfig(**settings | {"steps": None, "epochs": 1, "warmup_steps": 5}))
    with pytest.raises(InputError, match=r"^--warmup-steps 5 is more than the 4 updates of the run: "):
        Trainer(prepared)


def test_skipped_update_keeps_number_and_delays_rate(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings |= {"steps": 4, "warmup_steps": 4, "validation_fraction": 0.0}
    prepared = set_up_training(TrainConfig(**settings))
    trainer = Trainer(prepared)
    first = next(prepared.model.parameters())
    calls: list[None] = []

    def spoil_the_second(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return gradient * math.inf if len(calls) == 3 else gradient  # two micro-batches an update

    first.register_hook(spoil_the_second)
    outcome = trainer.run(RunDirectory.create(tmp_path / "run", {}), callback=RecordingCallback())
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["skipped"] for row in rows] == [None, "non-finite gradient", None, None]
    assert rows[2]["lr"] == rows[1]["lr"] > rows[0]["lr"]
    assert (outcome.step, outcome.skipped, outcome.finished) == (4, 1, True)


def test_run_that_only_skips_is_stopped(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings |= {"steps": 100, "validation_fraction": 0.0, "global_batch": 1}
    prepared = set_up_training(TrainConfig(**settings))
    next(prepared.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(BigbatchError, match=r"^the last 50 updates were skipped \(non-finite gradient\), so the model"):
        Trainer(prepared).run(RunDirectory.create(tmp_path / "run", {}), callback=RecordingCallback())
    assert len(metrics(tmp_path / "run")) == 50


def test_training_restores_random_state_of_caller(tmp_path: Path, settings: dict[str, Any]) -> None:
    before = torch.random.get_rng_state()
    run(tmp_path / "run", **settings)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_sampling_and_validation_restore_mode_and_random_state(settings: dict[str, Any]) -> None:
    trainer = Trainer(set_up_training(TrainConfig(**settings)))
    before = torch.random.get_rng_state()
    assert trainer.sample_text() == trainer.sample_text()
    trainer.validate()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(module.training for module in trainer.setup.model.modules())


# how much is in memory at once -----------------------------------------------------------------------------------


def cut(settings: dict[str, Any], **how: Any) -> dict[str, Any]:
    return settings | {"microbatch": None if "token_budget" in how else "auto"} | how


@pytest.mark.parametrize("how", [{}, slow({"memory": "100%"}), {"token_budget": 70}], ids=str)
def test_token_split_gives_same_parameters_and_validation(
    tmp_path: Path, settings: dict[str, Any], how: dict[str, Any]
) -> None:
    settings |= {"precision": "float64", "validation_every": 1, "validation_fraction": 0.2}
    prepared, recorder, _ = run(tmp_path / "run", **cut(settings, **how))
    whole, expected, _ = run(tmp_path / "whole", **settings | {"microbatch": 100})
    difference = torch.linalg.norm(parameters(prepared) - parameters(whole)) / torch.linalg.norm(parameters(whole))
    assert difference < 1e-10
    assert [loss for _, loss in recorder.validations] == pytest.approx([loss for _, loss in expected.validations])
    assert [row["items"] for row in recorder.rows] == [row["items"] for row in expected.rows]


def test_no_microbatch_exceeds_token_budget(settings: dict[str, Any]) -> None:
    trainer = Trainer(set_up_training(TrainConfig(**cut(settings, token_budget=40))))
    for window in trainer.schedule.windows(0, 0):
        lengths = [len(sample["input_ids"]) for sample in trainer.fetch(window)]
        groups = trainer.engine.groups(lengths)
        assert sorted(i for rows in groups for i in rows) == list(range(len(window)))
        assert all(len(rows) * max(lengths[i] for i in rows) <= 40 for rows in groups)


def test_auto_reports_and_saves_its_choice(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = Trainer(set_up_training(TrainConfig(**cut(settings))))
    assert trainer.engine.choice is None
    before = parameters(trainer.setup)
    random_state = torch.random.get_rng_state()
    assert trainer.tune() is None
    choice = trainer.engine.choice
    assert choice is not None
    assert torch.equal(parameters(trainer.setup), before)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert choice.unit == "tokens"
    assert choice.peak_bytes <= choice.limit_bytes
    trainer.run(RunDirectory.create(tmp_path / "run", {}), callback=RecordingCallback())
    assert trainer.engine.choice is choice
    assert load_cached(tmp_path / "run", cache_key(trainer.setup)) == CachedChoice(choice, "none", tmp_path / "run")


def test_checkpointing_changes_no_parameter(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings["precision"] = "float64"
    runs = [run(tmp_path / level, **settings, gradient_checkpointing=level)[0] for level in CHECKPOINTING_MODES]
    layers = [each.model.model.layers for each in runs]
    assert [[layer.gradient_checkpointing for layer in each] for each in layers] == [[0, 0], [1, 0], [1, 1], [1, 1]]
    expected = parameters(runs[0])
    for each in runs[1:]:
        assert torch.linalg.norm(parameters(each) - expected) / torch.linalg.norm(expected) < 1e-10


def refused(settings: dict[str, Any]) -> str:
    """What is said of settings that cannot be trained with."""
    with pytest.raises(InputError) as caught:
        Trainer(set_up_training(TrainConfig(device="cpu", **settings))).tune()
    return str(caught.value)


def test_memory_with_given_microbatch_is_rejected(settings: dict[str, Any]) -> None:
    assert refused(settings | {"memory": "1GiB"}) == (
        "--memory limits --microbatch auto and cannot be combined with --microbatch 8. Remove one of them."
    )
    assert refused(settings | {"gpu": "t4", "microbatch": None, "token_budget": 70}) == (
        "--gpu limits --microbatch auto and cannot be combined with --token-budget 70. Remove one of them."
    )


def test_gpu_setting_without_gpu_is_rejected(settings: dict[str, Any]) -> None:
    assert refused(cut(settings, gpu="t4")) == "--gpu t4 needs a CUDA device, and this run is on cpu. Pass --memory."


def test_token_budget_below_longest_sequence_is_rejected(settings: dict[str, Any]) -> None:
    assert refused(cut(settings, token_budget=31)) == (
        "--token-budget 31 is less than the longest sequence, which has 32 tokens and is never cut: pass "
        "--token-budget 32 or more, or a smaller --max-length."
    )
    assert Trainer(set_up_training(TrainConfig(**cut(settings, token_budget=32)))).engine.token_budget == 32


def test_memory_above_available_is_rejected(settings: dict[str, Any]) -> None:
    said = refused(cut(settings, memory="100TiB"))
    assert re.fullmatch(
        r"--memory 100TiB is more than the [\d.]+GiB that the device has: pass [\d.]+GiB or less, or a share such as "
        r"90%\.",
        said,
    )


def test_memory_below_one_sequence_is_rejected(settings: dict[str, Any]) -> None:
    said = refused(cut(settings, memory="1MiB"))
    assert said.startswith("a sample of 32 tokens needs ")
    assert ", but memory is limited to 1MiB, all of which this process uses outside of tensors. " in said
    assert said.endswith(
        "Here that is --max-length, --gradient-checkpointing, --precision bf16-weights and --lora-rank."
    )


def test_timed_limit_is_rejected_in_deterministic_runs(
    settings: dict[str, Any],
) -> None:
    prepared = set_up_training(
        TrainConfig(**settings | {"microbatch": "auto", "memory": "4GiB", "deterministic": True})
    )
    with pytest.raises(InputError, match=r"^--memory is for a micro-batch that is chosen by timing, which --determ"):
        Trainer(prepared)
