"""What a run may be asked for when it goes on."""

from pathlib import Path
from typing import Any

import pytest

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
