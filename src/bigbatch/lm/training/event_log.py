"""What happens to a run besides its updates: events.jsonl, a line whenever a process begins, goes on or ends.

    begin → finished | stopped | failed | nothing, where the process was killed → resume → …

Lines are only added: metrics.jsonl is cut when a run goes on from a checkpoint, and what happened before stays true.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbatch import __version__
from bigbatch.lm.runs.file_names import CONFIG, EVENTS

if TYPE_CHECKING:
    from bigbatch.lm.training.callbacks import TrainResult
    from bigbatch.lm.training.trainer import Trainer

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "peft", "safetensors")
KEPT_FIRST, KEPT_LAST = 20, 4  # micro-batches of the first window that are told with all their lengths


class EventLog:
    """Tell the beginning and the end of one process of a run.

        with Journal(trainer, folder) as journal:
            journal.ended(trainer.run(...), signal=None)

    What cannot be written is not: the run goes on, and its report lacks that line.

    Args:
        trainer: Of this process, ready to run.
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
        """Tell how it ended; ``signal`` is what stopped it, where something did."""
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
        with suppress(OSError), (self._folder / EVENTS).open("a+b") as file:
            file.write(line if _ends_a_line(file) else b"\n" + line)


def _ends_a_line(file: Any) -> bool:
    """Tell whether a file is empty or ends with a whole line: a killed process may have written half of one."""
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def _beginning(trainer: "Trainer", folder: Path) -> dict[str, Any]:
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
        "recomputed": trainer.checkpointing_mode,
        "versions": versions(),
        "window": first_window(trainer),
    }


def versions() -> dict[str, str]:
    """Give what the figures of a run depend on, by name."""
    found = {"bigbatch": __version__, "Python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found | {"system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"}


def _changed(trainer: "Trainer", folder: Path) -> dict[str, Any]:
    """Give the settings that are others than those of config.json: those that `bigbatch resume` was given."""
    with suppress(OSError, ValueError):
        stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        now = trainer.config.model_dump(mode="json", exclude={"out"})
        return {name: value for name, value in now.items() if name in stored and stored[name] != value}
    return {}


def first_window(trainer: "Trainer") -> dict[str, Any] | None:
    """Give the micro-batches of the first window, as tokens of each sample; None where none are chosen yet."""
    engine = trainer.engine
    if engine.microbatch == "auto" and engine.choice is None:
        return None
    lengths = sorted(
        (trainer.setup.training.lengths[i] for i in trainer.shard_window(trainer.schedule.first_window())), reverse=True
    )
    microbatches = [[lengths[i] for i in group] for group in engine.groups(lengths)]
    return {
        "layout": engine.layout,
        "token_budget": engine.token_budget,
        "num_samples": len(lengths),
        "tokens": sum(lengths),
        "laid_out_tokens": sum(_laid_out(group, engine.layout) for group in microbatches),
        "num_microbatches": len(microbatches),
        "first": microbatches[:KEPT_FIRST],
        "last": microbatches[KEPT_FIRST:][-KEPT_LAST:],
    }


def _laid_out(lengths: Sequence[int], layout: str) -> int:
    return sum(lengths) if layout == "packed" else len(lengths) * max(lengths)
