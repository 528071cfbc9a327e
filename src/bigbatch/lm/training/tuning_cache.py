"""The micro-batch that earlier runs chose: kept in each run directory, and taken again where everything is the same."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bigbatch import __version__
from bigbatch.autotune.choice import MicrobatchChoice
from bigbatch.lm.config.field_types import CHECKPOINTING_MODES, CheckpointingMode
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.files import write_atomically
from bigbatch.lm.runs.file_names import TUNED_MICROBATCH
from bigbatch.lm.training.setup import TrainingSetup

SETTINGS = ("max_length", "global_batch", "global_batch_tokens", "memory", "gpu", "precision", "lora_rank")


def cache_key(setup: TrainingSetup) -> str:
    """Give what a choice depends on as one word: model, device, settings, lengths of the data, and versions."""
    import transformers

    config: TrainConfig = setup.config
    facts = {
        "model": setup.model.config.to_json_string(),
        "trained": sum(p.numel() for p in setup.model.parameters() if p.requires_grad),
        "device": str(setup.device_spec),
        "threads": torch.get_num_threads(),
        "loss": type(setup.loss_fn).__name__,
        "checkpointing": config.gradient_checkpointing,
        "arrangement": [setup.model_setup.layout, setup.model_setup.uses_cuda_graphs, _is_compiled(setup)],
        "settings": {name: getattr(config, name) for name in SETTINGS},
        "lengths": [len(setup.training.lengths), sum(setup.training.lengths), max(setup.training.lengths)],
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class CachedChoice:
    """What an earlier run chose.

    Attributes:
        choice: The micro-batch.
        checkpointing_mode: What was computed anew in backward.
        folder: The run directory that it comes from.
    """

    choice: MicrobatchChoice
    checkpointing_mode: CheckpointingMode
    folder: Path


def _is_compiled(setup: TrainingSetup) -> bool:
    layers = setup.model_setup.layers
    return layers is not None and layers.is_compiled


def save_cached(folder: Path, choice: MicrobatchChoice, key: str, *, checkpointing_mode: CheckpointingMode) -> None:
    """Write a choice into a run directory; where that cannot be, the next run chooses for itself."""
    with suppress(OSError):
        cached = {"key": key, "level": checkpointing_mode, **asdict(choice)}
        write_atomically(folder / TUNED_MICROBATCH, (json.dumps(cached, indent=2) + "\n").encode())


def load_cached(folder: Path, key: str, *, usable_bytes: int | None = None) -> CachedChoice | None:
    """Find a choice that was made for the same, in a run directory or in those beside it.

    What is there and cannot be read counts as not there.

    Args:
        folder: The run directory, which need not be there.
        key: The `fingerprint` of the run.
        usable_bytes: What tensors may take now, where a choice whose peak is above does not count: memory that was free
            when it was made need not be free any more.
    """
    for place in _places(folder):
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            kept = json.loads((place / TUNED_MICROBATCH).read_text(encoding="utf-8"))
            if not isinstance(kept, dict) or kept.pop("key") != key:
                continue
            mode = kept.pop("level")
            choice = MicrobatchChoice.from_dict(kept)
            if mode in CHECKPOINTING_MODES and (usable_bytes is None or choice.peak_bytes <= usable_bytes):
                return CachedChoice(choice, mode, place)
    return None


def _places(folder: Path) -> Iterator[Path]:
    yield folder
    with suppress(OSError):
        beside = [path for path in folder.parent.iterdir() if (path / TUNED_MICROBATCH).is_file()]
        yield from sorted(beside, key=lambda path: (path / TUNED_MICROBATCH).stat().st_mtime, reverse=True)
