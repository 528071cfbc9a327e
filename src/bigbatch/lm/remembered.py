"""The micro-batch that earlier runs chose: kept in each run directory, and taken again where everything is the same."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bigbatch.lm.config import TrainConfig
from bigbatch.lm.prepare import Prepared
from bigbatch.memory import Choice
from bigbatch.memory.choice import Tried
from bigbatch.memory.timing import Timing

FILE = "microbatch.json"
SETTINGS = ("max_length", "global_batch", "global_batch_tokens", "memory", "gpu", "precision", "lora_rank")


def fingerprint(prepared: Prepared) -> str:
    """Give what a choice depends on as one word: model, device, settings, lengths of the data, and versions."""
    import transformers

    config: TrainConfig = prepared.config
    facts = {
        "model": prepared.model.config.to_json_string(),
        "trained": sum(p.numel() for p in prepared.model.parameters() if p.requires_grad),
        "device": str(prepared.machine),
        "threads": torch.get_num_threads(),
        "checkpointing": config.gradient_checkpointing,
        "settings": {name: getattr(config, name) for name in SETTINGS},
        "lengths": [len(prepared.training.lengths), sum(prepared.training.lengths), max(prepared.training.lengths)],
        "versions": [torch.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def remember(folder: Path, choice: Choice, key: str) -> None:
    """Write a choice into a run directory."""
    (folder / FILE).write_text(json.dumps({"key": key, **asdict(choice)}, indent=2) + "\n", encoding="utf-8")


def recall(folder: Path, key: str) -> tuple[Choice, Path] | None:
    """Find a choice that was made for the same, in a run directory or in those beside it; give it with its directory.

    What is there and cannot be read counts as not there.
    """
    for place in _places(folder):
        with suppress(OSError, ValueError, TypeError, KeyError):
            kept = json.loads((place / FILE).read_text(encoding="utf-8"))
            if kept.pop("key") == key:
                return _choice(kept), place
    return None


def _places(folder: Path) -> Iterator[Path]:
    yield folder
    with suppress(OSError):
        beside = [path for path in folder.parent.iterdir() if (path / FILE).is_file()]
        yield from sorted(beside, key=lambda path: (path / FILE).stat().st_mtime, reverse=True)


def _choice(kept: dict[str, Any]) -> Choice:
    kept["tried"] = tuple(Tried(**tried) for tried in kept["tried"])
    kept["timing"] = Timing(tuple((int(size), float(seconds)) for size, seconds in kept["timing"]["points"]))
    return Choice(**kept)
