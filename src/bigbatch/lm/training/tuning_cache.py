"""Cache of tuned micro-batches: stored in the run directory, reused by runs with the same cache key."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bigbatch import __version__
from bigbatch.autotune.choice import MicrobatchChoice
from bigbatch.lm.checkpoint.saved_state import read_choice
from bigbatch.lm.config.field_types import CHECKPOINTING_MODES, CheckpointingMode
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.files import read_json, write_atomically
from bigbatch.lm.runs.file_names import TUNED_MICROBATCH
from bigbatch.lm.training.setup import TrainingSetup

SETTINGS = (
    "max_length",
    "global_batch",
    "global_batch_tokens",
    "memory",
    "gpu",
    "precision",
    "logits",
    "offload",
    "lora_rank",
    "lora_targets",
    "lora_dropout",
    "dora",
    "quantize",
)


def cache_key(setup: TrainingSetup) -> str:
    """Return a hash of everything a choice depends on: model, device, settings, lengths of the data, and versions."""
    import transformers

    config: TrainConfig = setup.config
    model_setup = setup.model_setup
    facts = {
        "model": setup.model.config.to_json_string(),
        "trained": sum(p.numel() for p in setup.model.parameters() if p.requires_grad),
        "device": str(setup.device_spec),
        "threads": torch.get_num_threads(),
        "loss": _loss_name(setup),
        "checkpointing": config.gradient_checkpointing,
        "arrangement": [model_setup.layout, model_setup.uses_cuda_graphs, model_setup.has_compiled_layers],
        "settings": {name: getattr(config, name) for name in SETTINGS},
        "lengths": [len(setup.training), setup.training.num_tokens, setup.training.longest],
        "counts": "waits for gradient sums" if config.offload == "gradients" else None,
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class CachedChoice:
    """The choice of an earlier run.

    Attributes:
        choice: The micro-batch.
        checkpointing_mode: The mode of activation checkpointing.
        folder: The run directory that holds it.
    """

    choice: MicrobatchChoice
    checkpointing_mode: CheckpointingMode
    folder: Path


def _loss_name(setup: TrainingSetup) -> str:
    balanced = setup.model_setup.balanced
    name = f"{type(setup.loss_fn).__name__} {setup.passed.get('loss_fn', '')}".rstrip()
    return name + ("" if balanced is None else f", {balanced.scope} load balancing")


def save_cached(folder: Path, choice: MicrobatchChoice, key: str, *, checkpointing_mode: CheckpointingMode) -> None:
    """Write a choice into a run directory; a write error is ignored, and the next run tunes again."""
    with suppress(OSError):
        cached = {"key": key, "level": checkpointing_mode, **asdict(choice)}
        write_atomically(folder / TUNED_MICROBATCH, (json.dumps(cached, indent=2) + "\n").encode())


def load_cached(folder: Path, key: str, *, usable_bytes: int | None = None) -> CachedChoice | None:
    """Return a choice with the same key from a run directory or its siblings; None if there is none.

    Unreadable files are ignored.

    Args:
        folder: The run directory; it need not exist.
        key: The `cache_key` of the run.
        usable_bytes: Memory that tensors may use now; a choice with a higher peak is ignored. None for no limit.
    """
    for candidate in _candidate_folders(folder):
        with suppress(OSError, ValueError, TypeError, KeyError):
            stored = read_json(candidate / TUNED_MICROBATCH)
            if not isinstance(stored, dict) or stored.pop("key") != key:
                continue
            mode = stored.pop("level")
            choice = read_choice(stored)
            if mode in CHECKPOINTING_MODES and (usable_bytes is None or choice.peak_bytes <= usable_bytes):
                return CachedChoice(choice, mode, candidate)
    return None


def _candidate_folders(folder: Path) -> Iterator[Path]:
    yield folder
    with suppress(OSError):
        siblings = [path for path in folder.parent.iterdir() if (path / TUNED_MICROBATCH).is_file()]
        yield from sorted(siblings, key=lambda path: (path / TUNED_MICROBATCH).stat().st_mtime, reverse=True)
