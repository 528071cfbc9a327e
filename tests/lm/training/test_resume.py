"""What a run may be asked for when it goes on."""

from pathlib import Path
from typing import Any

import pytest

from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.training.resume import merge_config

FULL: dict[str, Any] = {
    "data": "data.jsonl", "validation_fraction": 0.1, "max_length": 64, "skip_broken": True, "model": "folder",
    "lora_rank": 4, "lora_alpha": 3.0, "global_batch": 16, "lr": 0.1, "schedule": "constant", "weight_decay": 0.0,
    "max_grad_norm": 2.0, "seed": 3, "device": "cpu", "precision": "float64", "gradient_checkpointing": "full",
    "parallel": "fsdp", "timeout_s": 20.0, "validation_every": 7, "sample_prompt": "x", "checkpoint_every": 5,
    "keep": 3, "async_checkpoint": True, "max_skipped": 9, "grace_s": 3.0, "deterministic": True, "layout": "padded",
    "compile": "none",
}  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"token_budget": 64, "steps": 9, "warmup_steps": 2},
        {"microbatch": 3, "epochs": 2},
        {"microbatch": "auto", "memory": "1GiB", "deterministic": False},
        {"global_batch": None, "global_batch_tokens": 500},
    ],
)
def test_repeated_train_command_resumes_its_run(tmp_path: Path, more: dict[str, Any]) -> None:
    """As torchrun does it."""
    asked = TrainConfig(out=tmp_path, **{name: value for name, value in (FULL | more).items() if value is not None})
    stored = asked.resolved()
    assert merge_config(stored, asked, allowed=()) == stored


@pytest.mark.parametrize(
    ("stored", "asked", "message"),
    [
        ({"reproducible": True}, {"microbatch": 3}, "--microbatch 3 is no whole number of quanta"),
        ({"reproducible": True}, {"parallel": "fsdp"}, "--reproducible needs whole gradients on every rank"),
        ({"objective": "dpo"}, {"layout": "packed"}, "--layout packed is not supported with --objective dpo"),
        ({"optimizer": "adamw-8bit"}, {"precision": "float64"}, "--optimizer adamw-8bit computes in float32"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(
    stored: dict[str, Any], asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        merge_config(TrainConfig(**stored).resolved(), TrainConfig(**asked), allowed=())


def test_changed_setting_replaces_what_it_excludes() -> None:
    stored = TrainConfig(early_stopping=2, early_stopping_min_delta=0.1, cache=Path("tokens")).resolved()
    merged = merge_config(stored, TrainConfig(early_stopping=None, no_cache=True), allowed=())
    assert (merged.early_stopping, merged.no_cache, merged.cache) == (None, True, None)
    stored = TrainConfig(global_batch_schedule="0:8 1e5:16").resolved()
    merged = merge_config(stored, TrainConfig(global_batch_schedule="0:4 1e5:16"), allowed=("batch",))
    assert merged.resolved().global_batch == 4
