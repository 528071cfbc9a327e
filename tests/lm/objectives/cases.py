"""Runs of each objective, in float64, and the gradient of their batches in any cut."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bigbatch
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.training.engine_factory import make_engine
from bigbatch.lm.training.reference import add_reference
from bigbatch.lm.training.setup import TrainingSetup, set_up_training
from support.language_models import examples, pairs, save_model_folder, write_jsonl

OBJECTIVES: dict[str, dict[str, Any]] = {
    "reward": {"objective": "reward"},
    "reward centred": {"objective": "reward", "center_rewards_coefficient": 0.01},
    "dpo": {"objective": "dpo"},
    "dpo smoothed": {"objective": "dpo", "dpo_beta": 0.3, "dpo_label_smoothing": 0.1},
    "ipo": {"objective": "dpo", "dpo_loss": "ipo"},
    "embedding": {"objective": "embedding"},
    "embedding last": {"objective": "embedding", "pooling": "last", "temperature": 0.2},
    "embedding ragged": {"objective": "embedding"},
}
NUM_SAMPLES = 13


def make_folder(folder: Path) -> Path:
    """Write the model and the data."""
    torch.manual_seed(0)
    save_model_folder(folder / "base", kind="gpt2")  # without norms in float32, unlike Llama
    write_jsonl(folder / "pairs.jsonl", pairs(NUM_SAMPLES))
    write_jsonl(folder / "examples.jsonl", examples(NUM_SAMPLES))
    ragged = [row | {"negative": row["negative"][: i % 3]} for i, row in enumerate(examples(NUM_SAMPLES, negatives=2))]
    write_jsonl(folder / "ragged.jsonl", ragged)
    return folder


def set_up(folder: Path, name: str, **settings: Any) -> TrainingSetup:
    """Set up a run of all samples in float64."""
    data = "ragged" if name == "embedding ragged" else "examples" if name.startswith("embedding") else "pairs"
    base = {"model": str(folder / "base"), "device": "cpu", "max_length": 64, "precision": "float64", "no_cache": True}
    given = base | {"data": str(folder / f"{data}.jsonl"), "validation_fraction": 0.0} | OBJECTIVES[name] | settings
    return set_up_training(TrainConfig.model_validate(given))


def samples_of(setup: TrainingSetup) -> list[dict[str, Any]]:
    """Return all samples, with a reference that differs from the model."""
    samples = [setup.training[i] for i in range(len(setup.training))]
    add_reference(setup, samples)
    for i, sample in enumerate(samples):
        if "reference" in sample:
            sample["reference"] = sample["reference"] + torch.tensor([math.sin(i), math.cos(3 * i)])
    return samples


def gradient(setup: TrainingSetup, samples: list[dict[str, Any]], microbatch: int, **engine: Any) -> dict[str, Tensor]:
    """Return the gradient of the batch, or of the ranks' batches, by an engine with micro-batches of a size."""
    optimizer = torch.optim.SGD(setup.model.parameters(), lr=0.0)
    make_engine(setup.model_setup, optimizer, microbatch=microbatch, **engine).backward(samples)
    return _taken(setup.model)


def whole_gradient(setup: TrainingSetup, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return the gradient of the batch in one forward and backward of torch."""
    device = setup.device_spec.device
    model, loss_fn = setup.model, setup.loss_fn
    batch = {name: tensor.to(device) for name, tensor in setup.collate(samples).items()}
    if isinstance(loss_fn, bigbatch.Coupled):
        loss_fn.loss(model, loss_fn.encode(model, batch)).backward()
    else:
        loss_sum, items = loss_fn(model, batch)
        (loss_sum / items).backward()
    return _taken(model)


def _taken(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def relative_error(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    difference = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return math.sqrt(difference / sum(float(g.square().sum()) for g in other.values()))
