"""Event log of a run, events.jsonl: one line whenever a process begins, resumes or ends the run.

    begin → finished | stopped | failed | nothing if the process was killed → resume → …

The file is append-only: metrics.jsonl is truncated when a run resumes from a checkpoint, the events are not.
"""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbatch import __version__
from bigbatch.lm.files import open_regular, read_json
from bigbatch.lm.runs.file_names import CONFIG, EVENTS

if TYPE_CHECKING:
    from bigbatch.lm.training.callbacks import TrainResult
    from bigbatch.lm.training.setup import TrainingSetup
    from bigbatch.lm.training.trainer import Trainer

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "peft", "safetensors")
LOGGED_FIRST, LOGGED_LAST = 20, 4  # micro-batches of the first window whose lengths are logged


class EventLog:
    """Log of the beginning and the end of one process of a run.

        with EventLog(trainer, folder) as event_log:
            event_log.log_end(trainer.run(...), signal=None)

    A write error is ignored: the run continues, and its report lacks that line.

    Args:
        trainer: The trainer of this process, ready to run.
        folder: The run directory.
    """

    def __init__(self, trainer: "Trainer", folder: Path) -> None:
        self._trainer = trainer
        self._folder = folder

    def __enter__(self) -> "EventLog":
        self._write(_beginning(self._trainer, self._folder))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._write({"event": "failed", "why": str(error) or type(error).__name__})

    def log_end(self, outcome: "TrainResult", *, signal: str | None) -> None:
        """Log the result; ``signal`` names the signal that stopped the run, if any."""
        self._write(
            {
                "event": "finished" if outcome.finished else "stopped",
                "step": outcome.step,
                "why": None if outcome.finished else signal,
                "elapsed_s": outcome.elapsed_s if self._has_clock else None,
            }
        )

    @property
    def _has_clock(self) -> bool:
        return not self._trainer.config.deterministic

    def _write(self, event: Mapping[str, Any]) -> None:
        at = datetime.now(UTC).isoformat(timespec="seconds") if self._has_clock else None
        line = json.dumps({"at": at, **event}).encode() + b"\n"
        with suppress(OSError), open_regular(self._folder / EVENTS, "a+b") as file:
            file.write(line if _ends_a_line(file) else b"\n" + line)


def _ends_a_line(file: Any) -> bool:
    """Return whether a file is empty or ends with a newline; a killed process may leave an incomplete line."""
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def _beginning(trainer: "Trainer", folder: Path) -> dict[str, Any]:
    from bigbatch.lm.training.chat_detection import trains_on_chats  # imports torch

    setup, checkpoint = trainer.setup, trainer.checkpoint
    parameters = list(setup.model.parameters())
    return {
        "event": "begin" if checkpoint is None else "resume",
        "step": 0 if checkpoint is None else checkpoint.progress.step,
        "checkpoint": None if checkpoint is None else checkpoint.path.name,
        "passed_over": [] if checkpoint is None else [[path.name, why] for path, why in checkpoint.rejected],
        "total_steps": trainer.total_steps,
        "settings": _changed(trainer, folder),
        "machine": str(setup.device_spec),
        "device": setup.device_spec.device.type,
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "fp8": _fp8(setup),
        "recomputed": trainer.model_setup.checkpointing_mode,
        "versions": versions(),
        "chats": trains_on_chats(setup),
        "loss_fn": setup.passed.get("loss_fn"),
        "process_bytes": None if trainer.config.deterministic else _process_bytes(trainer),
        "window": first_window(trainer),
    }


def _fp8(setup: "TrainingSetup") -> dict[str, Any] | None:
    """Return which products are in float8 and how far they move the gradient; None without, and in a resumed run."""
    layers, gradient = setup.model_setup.fp8, setup.fp8_gradient
    if layers is None or gradient is None:
        return None
    return {
        "layers": str(layers),
        "cosine": None if math.isnan(gradient.cosine) else gradient.cosine,
        "num_samples": gradient.num_samples,
        "note": str(gradient),
    }


def _process_bytes(trainer: "Trainer") -> int | None:
    """Return the memory of the process on the CPU before the first update, without tensors; None on other devices."""
    from torch import Tensor

    from bigbatch.memory.usage import bytes_outside

    model = trainer.setup.model
    if trainer.setup.device_spec.device.type != "cpu":
        return None
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    tensors = [*model.parameters(), *model.buffers(), *(value for value in states if isinstance(value, Tensor))]
    return bytes_outside(tensors)


def versions() -> dict[str, str]:
    """Return the versions on which the metrics of a run depend, by name."""
    found = {"bigbatch": __version__, "Python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found | {"system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"}


def _changed(trainer: "Trainer", folder: Path) -> dict[str, Any]:
    """Return the settings that differ from config.json, because `bigbatch resume` changed them."""
    with suppress(OSError, ValueError, TypeError):
        stored = dict(read_json(folder / CONFIG))
        now = trainer.config.model_dump(mode="json", exclude={"out"})
        return {name: value for name, value in now.items() if name in stored and stored[name] != value}
    return {}


def first_window(trainer: "Trainer") -> dict[str, Any] | None:
    """Return the micro-batches of the first window as tokens per sample; None before the micro-batch is chosen."""
    engine = trainer.engine
    if engine.microbatch == "auto" and engine.choice is None:
        return None
    lengths = sorted(
        (int(trainer.setup.training.lengths[i]) for i in trainer.shard_window(trainer.schedule.first_window())),
        reverse=True,
    )
    microbatches = [[lengths[i] for i in group] for group in engine.groups(lengths)]
    return {
        "layout": engine.layout,
        "token_budget": engine.token_budget,
        "num_samples": len(lengths),
        "tokens": sum(lengths),
        "laid_out_tokens": sum(_padded_tokens(group, engine.layout) for group in microbatches),
        "num_microbatches": len(microbatches),
        "first": microbatches[:LOGGED_FIRST],
        "last": microbatches[LOGGED_FIRST:][-LOGGED_LAST:],
    }


def _padded_tokens(lengths: Sequence[int], layout: str) -> int:
    return sum(lengths) if layout == "packed" else len(lengths) * max(lengths)
