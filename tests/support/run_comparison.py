"""Comparison of two runs to the last bit: model, metrics, quarantined samples, newest checkpoint and learning rates."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from bigbatch.lm.checkpoint import newest, read
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.samples import read_samples
from bigbatch.lm.training.optimizer import lr_factor
from support.language_models import metrics

CLOCK = {"tokens_per_s", "elapsed_s", "peak_bytes"}
"""Columns of metrics.jsonl that depend on the machine."""


def differences(run: Path, reference: Path) -> list[str]:
    """Return the results that differ from an uninterrupted run, timings excluded, and wrong learning rates."""
    return differing_results(run, reference) + wrong_learning_rates(run)


def differing_results(run: Path, other: Path) -> list[str]:
    """Return the names of results that are not bit-identical in two runs, timings excluded."""
    one, two = results(run), results(other)
    return [name for name in one if one[name] != two[name]]


def results(run: Path) -> dict[str, Any]:
    """Return the results of a run: model, metrics, quarantine, samples of text, newest checkpoint."""
    quarantine = run / "quarantine.jsonl"
    path, _ = newest(run / "checkpoints")
    assert path is not None
    contents = read(path)
    saved = [name for name in ("model/model.safetensors", "adapter/adapter_model.safetensors") if (run / name).exists()]
    assert len(saved) == 1, saved
    state = contents.values["state"]
    del state["progress"]["metrics_bytes"]  # timings vary in their number of digits
    return {
        "model": {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in saved},
        "metrics": [json.dumps({k: v for k, v in row.items() if k not in CLOCK}) for row in metrics(run)],
        "quarantine": quarantine.read_bytes() if quarantine.exists() else b"",
        "samples": read_samples(run),
        "checkpoint": path.name,
        "state": json.dumps(state),
        "tensors": {
            name: (str(tensor.dtype), tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            for file in contents.tensors.values()
            for name, tensor in file.items()
        },
    }


def wrong_learning_rates(run: Path) -> list[str]:
    """Return the updates whose learning rate differs from the schedule at the number of updates applied before."""
    config = TrainConfig.model_validate_json((run / "config.json").read_bytes())
    rows = metrics(run)
    warmup_steps, applied, wrong = config.warmup_steps_of(len(rows)), 0, []
    for number, row in enumerate(rows, 1):
        factor = lr_factor(
            applied,
            total_steps=len(rows),
            warmup_steps=warmup_steps,
            schedule=config.schedule,
            final=config.final_lr_factor(),
            decay_steps=config.decay_steps_of(len(rows)),
        )
        if row["step"] != number or row["lr"] != config.lr * factor:
            wrong.append(f"line {number}")
        applied += row["skipped"] is None
    return wrong
