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
from bigbatch.lm.training.evaluation import evenly_spaced
from bigbatch.lm.training.optimizer import lr_factor
from bigbatch.lm.training.setup import set_up_training
from bigbatch.lm.training.trainer import Trainer
from bigbatch.lm.training.tuning_cache import CachedChoice, cache_key, load_cached
from support.language_models import (
    RecordingCallback,
    conversations,
    metrics,
    records,
    run,
    save_model_folder,
    write_jsonl,
)

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


def test_every_microbatch_gives_the_same_parameters(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings |= {"precision": "float64", "max_grad_norm": 0.5, "warmup_steps": 2}
    runs = {size: run(tmp_path / f"run{size}", **settings | {"microbatch": size}) for size in (1, 3, 8, 100)}
    expected = parameters(runs[100][0])
    for size, (prepared, heard, _) in runs.items():
        assert torch.linalg.norm(parameters(prepared) - expected) / torch.linalg.norm(expected) < 1e-10
        assert [row["num_microbatches"] for row in heard.rows] == [math.ceil(12 / size)] * 3
        assert [row["loss"] for row in heard.rows] == pytest.approx(
            [row["loss"] for row in runs[100][1].rows], rel=1e-9
        )


def test_an_epoch_uses_every_sequence_once_and_its_last_window_is_shorter(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings |= {"steps": None, "epochs": 1, "validation_fraction": 0.0}
    prepared, heard, outcome = run(tmp_path / "run", **settings)
    assert outcome.step == len(heard.rows) == 4  # 40 sequences: 12 + 12 + 12 + 4
    assert sum(row["items"] for row in heard.rows) == sum(prepared.training.label_counts)
    assert sum(row["tokens"] for row in heard.rows) == sum(prepared.training.lengths)
    assert heard.rows[-1]["num_microbatches"] == 1


def test_a_batch_in_tokens_takes_the_whole_sequences_that_come_closest(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings |= {"global_batch": None, "global_batch_tokens": 100}
    prepared, heard, _ = run(tmp_path / "run", **settings)
    longest = max(prepared.training.lengths)
    assert all(abs(row["tokens"] - 100) <= longest / 2 for row in heard.rows)


def test_metrics_have_one_line_an_update_with_the_keys_that_are_promised(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    _, heard, outcome = run(tmp_path / "run", **settings, validation_every=2)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row.keys() - KEYS for row in rows] == [set(), {"validation_loss"}, {"validation_loss"}]
    assert all(row.keys() >= KEYS for row in rows)
    assert [row["skipped"] for row in rows] == [None] * 3
    assert rows == heard.rows
    assert outcome.validation_loss == rows[-1]["validation_loss"] == heard.validations[-1][1]
    assert [step for step, _ in heard.samples] == [1, 3]


def test_the_learning_rate_goes_by_updates(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings |= {"steps": 6, "warmup_steps": 2}
    rates = {
        size: [row["lr"] for row in run(tmp_path / f"{size}", **settings | {"microbatch": size})[1].rows]
        for size in (2, 12)
    }
    assert rates[2] == rates[12] == pytest.approx([0.01 * f for f in (1 / 3, 2 / 3, 1, 0.775, 0.325, 0.1)])


def test_a_constant_schedule_stays_after_its_warmup() -> None:
    factors = [lr_factor(step, total_steps=5, warmup_steps=1, schedule="constant") for step in range(5)]
    assert factors == [0.5, 1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_saved_model_is_the_trained_one(
    tmp_path: Path, settings: dict[str, Any], kind: str, lora_rank: int
) -> None:
    base = save_model_folder(tmp_path / kind, kind=kind)
    before = (base / "model.safetensors").read_bytes()
    prepared, _, _ = run(tmp_path / "run", **settings | {"model": str(base), "lora_rank": lora_rank})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")("def für 日本語", return_tensors="pt")
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
    prepared, heard, _ = run(tmp_path / "run", **settings, precision=precision)
    assert heard.rows[-1]["loss"] < heard.rows[0]["loss"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert loaded.dtype == dtype
    trained = dict(prepared.model.named_parameters())
    assert all(torch.equal(parameter, trained[name]) for name, parameter in loaded.named_parameters())


def test_float16_trains_with_its_scaler(tmp_path: Path, settings: dict[str, Any]) -> None:
    _, heard, _ = run(tmp_path / "run", **settings, precision="fp16")
    assert [row["skipped"] for row in heard.rows] == [None] * 3


def test_validation_and_samples_leave_training_as_it_was(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings["model"] = str(save_model_folder(tmp_path / "dropping", kind="gpt2", dropout=0.2))
    often, rare = (run(tmp_path / f"{n}", **settings, validation_every=n)[0] for n in (1, 3))
    assert torch.equal(parameters(often), parameters(rare)), "dropout drew other masks"
    assert often.model.training


def test_the_seed_decides(tmp_path: Path, settings: dict[str, Any]) -> None:
    once, again, other = (run(tmp_path / f"run{i}", **settings, seed=seed)[1].rows for i, seed in enumerate((1, 1, 2)))
    clock = {"elapsed_s", "tokens_per_s", "peak_bytes"}
    plain = [[{k: v for k, v in row.items() if k not in clock} for row in rows] for rows in (once, again, other)]
    assert plain[0] == plain[1] != plain[2]


def test_a_run_that_is_told_to_stop_saves_its_model(tmp_path: Path, settings: dict[str, Any]) -> None:
    heard = RecordingCallback()
    directory = RunDirectory.create(tmp_path / "run", {})
    outcome = Trainer(set_up_training(TrainConfig(**settings))).run(
        directory, callback=heard, should_stop=lambda: len(heard.rows) == 1
    )
    assert (outcome.step, outcome.finished) == (1, False)
    assert len(metrics(tmp_path / "run")) == 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.vocab_size


def test_conversations_train_on_the_turns_of_the_assistant(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "chat.jsonl", conversations(20))
    prepared, heard, _ = run(tmp_path / "run", data=str(data), steps=2, global_batch=4, max_length=128)
    assert 0 < heard.rows[0]["items"] < heard.rows[0]["tokens"]
    assert heard.rows[0]["items"] <= max(prepared.training.label_counts) * 4


def test_evenly_spaced_indices_reach_over_the_whole_set() -> None:
    assert evenly_spaced(3, 5) == [0, 1, 2]
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]


def test_every_document_is_used_once_an_epoch(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings |= {"steps": None, "epochs": 2, "validation_fraction": 0.0, "global_batch": 7}
    trainer = Trainer(set_up_training(TrainConfig(**settings)))
    windows = list(trainer.schedule.windows(0, 0))
    assert trainer.total_steps == len(windows) == 12
    assert [len(window) for window in windows] == [7, 7, 7, 7, 7, 5] * 2
    used = [[i for window in windows[start : start + 6] for i in window] for start in (0, 6)]
    assert sorted(used[0]) == sorted(used[1]) == list(range(40))
    assert used[0] != used[1]


def test_a_warmup_longer_than_the_run_is_refused(settings: dict[str, Any]) -> None:
    prepared = set_up_training(TrainConfig(**settings | {"steps": None, "epochs": 1, "warmup_steps": 5}))
    with pytest.raises(InputError, match=r"^--warmup-steps 5 is more than the 4 updates of the run: "):
        Trainer(prepared)


def test_a_skipped_update_keeps_its_number_and_the_rate_waits(tmp_path: Path, settings: dict[str, Any]) -> None:
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


def test_a_run_that_only_skips_is_given_up(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings |= {"steps": 100, "validation_fraction": 0.0, "global_batch": 1}
    prepared = set_up_training(TrainConfig(**settings))
    next(prepared.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(BigbatchError, match=r"^the last 50 updates were skipped \(non-finite gradient\), so the model"):
        Trainer(prepared).run(RunDirectory.create(tmp_path / "run", {}), callback=RecordingCallback())
    assert len(metrics(tmp_path / "run")) == 50


def test_training_leaves_the_random_state_of_the_caller(tmp_path: Path, settings: dict[str, Any]) -> None:
    before = torch.random.get_rng_state()
    run(tmp_path / "run", **settings)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_sample_and_a_validation_draw_nothing_and_put_the_mode_back(settings: dict[str, Any]) -> None:
    trainer = Trainer(set_up_training(TrainConfig(**settings)))
    before = torch.random.get_rng_state()
    assert trainer.sample_text("def ") == trainer.sample_text("def ")
    trainer.validate()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(module.training for module in trainer.setup.model.modules())


# how much is in memory at once -----------------------------------------------------------------------------------


def cut(settings: dict[str, Any], **how: Any) -> dict[str, Any]:
    return settings | {"microbatch": None if "token_budget" in how else "auto"} | how


@pytest.mark.parametrize("how", [{}, {"memory": "100%"}, {"token_budget": 70}], ids=str)
def test_a_cut_in_tokens_gives_the_same_parameters_and_validation(
    tmp_path: Path, settings: dict[str, Any], how: dict[str, Any]
) -> None:
    settings |= {"precision": "float64", "validation_every": 1, "validation_fraction": 0.2}
    prepared, heard, _ = run(tmp_path / "run", **cut(settings, **how))
    whole, expected, _ = run(tmp_path / "whole", **settings | {"microbatch": 100})
    difference = torch.linalg.norm(parameters(prepared) - parameters(whole)) / torch.linalg.norm(parameters(whole))
    assert difference < 1e-10
    assert [loss for _, loss in heard.validations] == pytest.approx([loss for _, loss in expected.validations])
    assert [row["items"] for row in heard.rows] == [row["items"] for row in expected.rows]


def test_no_micro_batch_is_above_the_token_budget(settings: dict[str, Any]) -> None:
    trainer = Trainer(set_up_training(TrainConfig(**cut(settings, token_budget=40))))
    for window in trainer.schedule.windows(0, 0):
        lengths = [len(sample["input_ids"]) for sample in trainer.fetch(window)]
        groups = trainer.engine.groups(lengths)
        assert sorted(i for rows in groups for i in rows) == list(range(len(window)))
        assert all(len(rows) * max(lengths[i] for i in rows) <= 40 for rows in groups)


def test_auto_says_what_it_chose_and_keeps_it(tmp_path: Path, settings: dict[str, Any]) -> None:
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
    assert [[layer.gradient_checkpointing for layer in each] for each in layers] == [[0, 0], [1, 0], [1, 1]]
    expected = parameters(runs[0])
    for each in runs[1:]:
        assert torch.linalg.norm(parameters(each) - expected) / torch.linalg.norm(expected) < 1e-10


def refused(settings: dict[str, Any]) -> str:
    """What is said of settings that cannot be trained with."""
    with pytest.raises(InputError) as caught:
        Trainer(set_up_training(TrainConfig(device="cpu", **settings))).tune()
    return str(caught.value)


def test_memory_beside_a_micro_batch_that_is_given_is_refused(settings: dict[str, Any]) -> None:
    assert refused(settings | {"memory": "1GiB"}) == (
        "--memory limits --microbatch auto and cannot be combined with --microbatch 8. Remove one of them."
    )
    assert refused(settings | {"gpu": "t4", "microbatch": None, "token_budget": 70}) == (
        "--gpu limits --microbatch auto and cannot be combined with --token-budget 70. Remove one of them."
    )


def test_a_card_is_refused_where_there_is_none(settings: dict[str, Any]) -> None:
    assert refused(cut(settings, gpu="t4")) == "--gpu t4 needs a CUDA device, and this run is on cpu. Pass --memory."


def test_a_token_budget_below_the_longest_sequence_is_refused(settings: dict[str, Any]) -> None:
    assert refused(cut(settings, token_budget=31)) == (
        "--token-budget 31 is less than the longest sequence, which has 32 tokens and is never cut: pass "
        "--token-budget 32 or more, or a smaller --max-length."
    )
    assert Trainer(set_up_training(TrainConfig(**cut(settings, token_budget=32)))).engine.token_budget == 32


def test_memory_that_is_not_there_is_refused(settings: dict[str, Any]) -> None:
    said = refused(cut(settings, memory="100TiB"))
    assert re.fullmatch(
        r"--memory 100TiB is more than the [\d.]+GiB that the device has: pass [\d.]+GiB or less, or a share such as "
        r"90%\.",
        said,
    )


def test_memory_for_less_than_one_sequence_is_refused(settings: dict[str, Any]) -> None:
    said = refused(cut(settings, memory="1MiB"))
    assert said.startswith("a sample of 32 tokens needs ")
    assert ", but memory is limited to 1MiB, all of which this process uses outside of tensors. " in said
    assert said.endswith(
        "Here that is --max-length, --gradient-checkpointing, --precision bf16-weights and --lora-rank."
    )


def test_a_limit_that_would_choose_by_the_clock_is_refused_where_the_clock_is_left_out(
    settings: dict[str, Any],
) -> None:
    prepared = set_up_training(
        TrainConfig(**settings | {"microbatch": "auto", "memory": "4GiB", "deterministic": True})
    )
    with pytest.raises(InputError, match=r"^--memory is for a micro-batch that is chosen by timing, which --determ"):
        Trainer(prepared)
