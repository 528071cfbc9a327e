"""Runs that are killed and resumed: each life a process of its own, forked so that torch is loaded once.

    bigbatch train … SIGKILL → bigbatch resume [… SIGKILL → bigbatch resume] → what differs from a run that never died

    python -m lm.killing FOLDER    reads a JSON object {"kind": …, "kills": […]} a line, and answers with one

Every life begins with random generators in a state of its own, as processes do.
"""

import functools
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigbatch.accumulation.pending_update import PendingUpdate
from bigbatch.cli.commands import resume, train
from bigbatch.cli.options import ResumeOptions
from bigbatch.execution.oom_retry import OomRetry
from bigbatch.lm.checkpoint import manager, newest, read
from bigbatch.lm.checkpoint.hashed_file import HashedFile
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.directory import RunDirectory, as_line
from bigbatch.lm.runs.file_names import TUNED_MICROBATCH
from bigbatch.lm.training import trainer
from bigbatch.lm.training.optimizer import lr_factor
from bigbatch.lm.training.trainer import Trainer
from lm.helpers import metrics, records, save_model_folder, write_jsonl

CLOCK = {"tokens_per_s", "elapsed_s", "peak_bytes"}
NEVER = 10**9

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "async": {"async_checkpoint": True},
    "lora": {"lora_rank": 2},
    "bf16-weights": {"precision": "bf16-weights"},
    "auto": {"microbatch": "auto"},
    "tokens": {"global_batch": None, "global_batch_tokens": 160},
    "schedule": {"global_batch": None, "global_batch_schedule": "0:4 60:8 150:12", "rebase_second_moment": True},
    "poisoned": {},
}
"""Runs of ten updates or so, of two passes, with dropout; some windows of the last one are not finite."""


@dataclass(frozen=True)
class Kill:
    """Where a life ends: at the number-th time that it comes to a point, or so many seconds after it begins to train.

    Points are called ``before X`` and ``after X``, and ``middle of metrics.jsonl``.
    """

    point: str = ""
    number: int = 1
    after_s: float = NEVER


@dataclass
class Points:
    """Counts what a life does, and ends it where it was told to."""

    kill: Kill
    seen: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    armed: bool = False

    def next_is(self, point: str) -> bool:
        """Whether this life ends when it reaches the point for the next time."""
        return self.armed and (point, self.counts[point] + 1) == (self.kill.point, self.kill.number)

    def reach(self, point: str) -> None:
        if not self.armed:
            return
        self.seen.append(point)
        self.counts[point] += 1
        if (point, self.counts[point]) == (self.kill.point, self.kill.number):
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, name: str, called: str) -> None:
        """Make a point of the beginning and of the end of a function."""
        real = getattr(owner, name)

        @functools.wraps(real)
        def watched(*words: Any, **options: Any) -> Any:
            self.reach(f"before {called}")
            result = real(*words, **options)
            self.reach(f"after {called}")
            return result

        setattr(owner, name, watched)

    def watch(self, began: int) -> None:
        """Watch all that this process does once it trains; then a byte is written to ``began``."""
        for name in ("fsync", "rename", "unlink", "rmdir", "mkdir", "truncate"):
            self.around(os, name, name)
        self.around(HashedFile, "write", "write")
        self.around(OomRetry, "run", "micro-batch")
        self.around(PendingUpdate, "add", "backward")
        self.around(torch.optim.AdamW, "step", "optimizer")
        self.around(torch.optim.lr_scheduler.LambdaLR, "step", "scheduler")
        self.around(manager, "write", "checkpoint")
        self.around(manager, "prune", "prune")
        self.around(trainer, "validation_loss", "validation")
        self.around(trainer, "sample_text", "sample")
        self.around(trainer, "save_model", "model")
        self._watch_lines()
        run = Trainer.run

        def armed(*words: Any, **options: Any) -> Any:
            self.armed = True
            os.write(began, b"!")
            self.reach("before training")
            return run(*words, **options)

        Trainer.run = armed  # type: ignore[method-assign]

    def _watch_lines(self) -> None:
        append = RunDirectory._append

        def watched(directory: RunDirectory, name: str, row: Any) -> None:
            self.reach(f"before {name}")
            if self.next_is(f"middle of {name}"):
                line = as_line(row)
                with (directory.path / name).open("ab") as file:
                    file.write(line[: len(line) // 2])
            self.reach(f"middle of {name}")
            append(directory, name, row)
            self.reach(f"after {name}")

        RunDirectory._append = watched  # type: ignore[method-assign]


def poison() -> None:
    """Let the windows that hold some of the samples have no finite loss."""
    begin = Trainer.__init__

    def poisoned(self: Trainer, *words: Any, **options: Any) -> None:
        begin(self, *words, **options)
        loss_fn = self.engine.loss_fn

        def sometimes_nan(model: Any, microbatch: Any) -> Any:
            loss_sum, items = loss_fn(model, microbatch)
            bad = ((microbatch["input_ids"] * microbatch["attention_mask"]).sum(1) % 13 == 3).any()
            return loss_sum * torch.where(bad, torch.nan, 1.0), items

        self.engine.loss_fn = sometimes_nan

    Trainer.__init__ = poisoned  # type: ignore[method-assign]


class Ground:
    """A folder of runs, beside one another.

    Args:
        folder: Is there, and empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        data = write_jsonl(folder / "data.jsonl", records(40))
        model = save_model_folder(folder / "base", kind="gpt2", dropout=0.1)
        self._settings: dict[str, Any] = {
            "data": str(data), "model": str(model), "device": "cpu", "global_batch": 8, "microbatch": 3, "epochs": 2,
            "lr": 1e-2, "max_length": 32, "checkpoint_every": 3, "validation_every": 4,
        }  # fmt: skip
        self._references: dict[str, Path] = {}
        self._number = 0

    def config(self, kind: str, path: Path) -> TrainConfig:
        return TrainConfig(out=path, **self._settings | KINDS[kind])

    def reference(self, kind: str) -> Path:
        """The run of this kind that never dies; made when it is first asked for."""
        if kind not in self._references:
            path = self.folder / f"{kind}-reference"
            died = self.live(kind, path, Kill())
            assert not died, self.log.read_text(encoding="utf-8")
            self._references[kind] = path
        return self._references[kind]

    def points(self, kind: str) -> Counter[str]:
        """How often the reference comes to each point."""
        self.reference(kind)
        return Counter(json.loads((self.folder / f"{kind}-reference.json").read_text(encoding="utf-8")))

    def seconds(self, kind: str) -> float:
        """How long the reference trains."""
        return sum(row["elapsed_s"] for row in metrics(self.reference(kind))) * 2

    def survive(self, kind: str, kills: list[Kill]) -> tuple[int, list[str]]:
        """Kill a run so often, and resume it each time; tell how often it died, and what differs in the end."""
        reference = self.reference(kind)
        self._number += 1
        path = self.folder / f"{kind}-{self._number}"
        num_died = 0
        for kill in (*kills, Kill()):
            died = self.live(kind, path, kill)
            if not died:
                break
            num_died += 1
            if kind == "auto" and newest(path / "checkpoints")[0] is not None:
                (path / TUNED_MICROBATCH).unlink(missing_ok=True)  # the checkpoint has to know
        return num_died, differences(path, reference)

    def live(self, kind: str, path: Path, kill: Kill) -> bool:
        """Begin a run, or go on with it, in a process of its own; tell whether it was killed.

        Raises:
            AssertionError: It failed by itself.
        """
        began, tell = os.pipe()
        child = os.fork()
        if child == 0:
            status = 70
            try:
                os.close(began)
                status = self._life(kind, path, kill, tell)
            except BaseException:  # noqa: BLE001 - this process ends here, whatever it is
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        os.close(tell)
        with os.fdopen(began, "rb") as pipe:
            if pipe.read(1) and kill.after_s < NEVER:
                time.sleep(kill.after_s)
                os.kill(child, signal.SIGKILL)
        _, ended = os.waitpid(child, 0)
        assert ended in (0, signal.SIGKILL), f"ended with {ended}: {self.log.read_text(encoding='utf-8')}"
        return ended == signal.SIGKILL

    def _life(self, kind: str, path: Path, kill: Kill, began: int) -> int:
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        random.seed(os.urandom(8))
        np.random.seed(random.randrange(2**32))
        torch.manual_seed(random.randrange(2**32))
        points = Points(kill)
        points.watch(began)
        if kind == "poisoned":
            poison()
        if (path / "config.json").exists():
            return resume.run(TrainConfig(), ResumeOptions(run=path))
        code = train.run(self.config(kind, path))
        path.with_name(f"{path.name}.json").write_text(json.dumps(points.counts), encoding="utf-8")
        return code


def differences(run: Path, reference: Path) -> list[str]:
    """Name what is not to the last bit as in a run to which nothing has happened, clocks aside."""
    return unlike(run, reference) + rates_off(run)


def unlike(run: Path, other: Path) -> list[str]:
    """Name what two runs do not have in common to the last bit, clocks aside."""
    one, two = results(run), results(other)
    return [name for name in one if one[name] != two[name]]


def results(run: Path) -> dict[str, Any]:
    """What a run has come to."""
    quarantine = run / "quarantine.jsonl"
    path, _ = newest(run / "checkpoints")
    assert path is not None
    contents = read(path)
    state = contents.values["state"]
    del state["progress"]["metrics_bytes"]  # clocks take more digits or fewer
    return {
        "model": hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest(),
        "metrics": [json.dumps({k: v for k, v in row.items() if k not in CLOCK}) for row in metrics(run)],
        "quarantine": quarantine.read_bytes() if quarantine.exists() else b"",
        "checkpoint": path.name,
        "state": json.dumps(state),
        "tensors": {
            name: (str(tensor.dtype), tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            for file in contents.tensors.values()
            for name, tensor in file.items()
        },
    }


def rates_off(run: Path) -> list[str]:
    """Name the updates whose learning rate is not what the schedule says of the updates that were applied before."""
    config = TrainConfig.model_validate_json((run / "config.json").read_bytes())
    rows = metrics(run)
    warmup_steps, applied, wrong = config.warmup_steps_of(len(rows)), 0, []
    for number, row in enumerate(rows, 1):
        factor = lr_factor(applied, total_steps=len(rows), warmup_steps=warmup_steps, schedule=config.schedule)
        if row["step"] != number or row["lr"] != config.lr * factor:
            wrong.append(f"line {number}")
        applied += row["skipped"] is None
    return wrong


def serve(ground: Ground, lines: Any, answer: Callable[[str], None]) -> None:
    """Do what each line asks for."""
    for line in lines:
        asked = json.loads(line)
        kills = [Kill(**kill) for kill in asked["kills"]]
        try:
            died, differs = ground.survive(asked["kind"], kills)
            answer(json.dumps({"died": died, "differs": differs}))
        except AssertionError as error:
            answer(json.dumps({"died": -1, "differs": [str(error)]}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Ground(Path(sys.argv[1])), sys.stdin, functools.partial(print, flush=True))
