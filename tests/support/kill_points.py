"""Runs that are killed, stopped or out of disk space and resumed, compared with an uninterrupted run.

    bigbatch train … SIGKILL → bigbatch resume [… SIGKILL → bigbatch resume] → differences from the uninterrupted run

At a named point or after some seconds; runs on two ranks after some seconds only.

    python -m support.kill_points FOLDER    reads JSON lines {"kind": …, "kills": […]} and prints a result each

Each process is forked, so that torch is loaded once, and starts with random generators in a new state.
"""

import errno
import functools
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
from typing import Any, Literal

import numpy as np
import torch

from bigbatch.accumulation.pending_update import PendingUpdate
from bigbatch.cli.commands import resume, train
from bigbatch.cli.options import ResumeOptions
from bigbatch.errors import BigbatchError
from bigbatch.execution.oom_retry import OomRetry
from bigbatch.lm.checkpoint import manager, newest
from bigbatch.lm.checkpoint.hashed_file import HashedFile
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.directory import RunDirectory, as_line
from bigbatch.lm.runs.file_names import TUNED_MICROBATCH
from bigbatch.lm.training import evaluation, model_saver
from bigbatch.lm.training.text_sample import TextSample
from bigbatch.lm.training.trainer import Trainer
from support.language_models import examples, metrics, pairs, records, save_model_folder, write_jsonl
from support.run_comparison import differences
from support.torchrun_ranks import Launch

NEVER = 10**9
CODES = {"kill": -signal.SIGKILL, "stop": 75, "full disk": 1}
"""How a process can be interrupted, and its exit code then: SIGKILL, SIGTERM, an error of the next disk operation."""

DIVERGING: dict[str, Any] = {
    "lr": 0.1, "schedule": "constant", "warmup_steps": 3, "validation_every": 1, "validation_fraction": 0.2,
}  # fmt: skip
"""Settings with which the validation loss has its minimum after update 4 of 10."""

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "async": {"async_checkpoint": True},
    "lora": {"lora_rank": 2, "lora_dropout": 0.1},
    "qlora": {"model": "packable", "lora_rank": 2, "quantize": "nf4-double", "optimizer": "adamw-8bit"},
    "bf16-weights": {"precision": "bf16-weights"},
    "auto": {"microbatch": "auto"},
    "offload": {"model": "packable", "precision": "bf16", "offload": "gradients"},
    "tokens": {"global_batch": None, "global_batch_tokens": 160},
    "mixed": {"data": "mixture", "data_weights": (0.5, 0.5), "epochs": 1},
    "schedule": {"global_batch": None, "global_batch_schedule": "0:4 60:8 150:12", "rebase_second_moment": True},
    "poisoned": {},
    "best": {**DIVERGING, "keep": "best"},
    "early": {**DIVERGING, "early_stopping": 2, "early_stopping_min_delta": 0.01},
    "dpo": {"objective": "dpo", "data": "pairs"},
    "reward": {"objective": "reward", "data": "pairs", "lora_rank": 2},
    "embedding": {"objective": "embedding", "data": "examples"},
}
"""Runs of about ten updates over two epochs, with dropout; some windows of ``poisoned`` are not finite."""

MORE_KINDS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "padded-budget": {"microbatch": None, "token_budget": 64, "layout": "padded"},
    "packed": {"model": "packable", "microbatch": None, "token_budget": 64, "layout": "packed"},
    "layer-checkpoints": {"gradient_checkpointing": "full"},
    "every-update": {"checkpoint_every": 1, "validation_every": 1, "keep": 2},
    "deterministic": {"deterministic": True, "schedule": "constant", "max_grad_norm": 0.5},
    "muon": {"optimizer": "muon", "schedule": "wsd"},
    "lion": {"optimizer": "lion", "schedule": "linear"},
    "ddp": {"parallel": "ddp", "deterministic": True, "timeout_s": 30},
    "fsdp": {"parallel": "fsdp", "deterministic": True, "timeout_s": 30},
}
"""More of them, without named points in tests; ``ddp`` and ``fsdp`` run on two ranks."""
ON_RANKS = ("ddp", "fsdp")


@dataclass(frozen=True)
class Kill:
    """When a process is interrupted: the number-th time at a point, or ``after_s`` seconds after training begins.

    Points are called ``before X`` and ``after X``, and ``middle of metrics.jsonl``. On two ranks the seconds count from
    the start of the processes, and ``rank`` is interrupted.
    """

    point: str = ""
    number: int = 1
    after_s: float = NEVER
    how: Literal["kill", "stop", "full disk"] = "kill"
    rank: int = 0


@dataclass
class KillPoints:
    """Counts the points that a process reaches, and kills it at one of them."""

    kill: Kill
    seen: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    armed: bool = False

    def next_is(self, point: str) -> bool:
        """Return whether the process is killed the next time it reaches the point."""
        return self.armed and (point, self.counts[point] + 1) == (self.kill.point, self.kill.number)

    def reach(self, point: str) -> None:
        if not self.armed:
            return
        self.seen.append(point)
        self.counts[point] += 1
        if (point, self.counts[point]) == (self.kill.point, self.kill.number):
            if self.kill.how == "full disk":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.kill(os.getpid(), signal.SIGKILL if self.kill.how == "kill" else signal.SIGTERM)

    def around(self, owner: Any, name: str, called: str) -> None:
        """Add a point before and after a function."""
        real = getattr(owner, name)

        @functools.wraps(real)
        def watched(*words: Any, **options: Any) -> Any:
            self.reach(f"before {called}")
            result = real(*words, **options)
            self.reach(f"after {called}")
            return result

        setattr(owner, name, watched)

    def watch(self, began: int) -> None:
        """Add all points; write a byte to ``began`` when training starts."""
        for name in ("fsync", "rename", "unlink", "rmdir", "mkdir", "truncate"):
            self.around(os, name, name)
        self.around(HashedFile, "write", "write")
        self.around(OomRetry, "run", "micro-batch")
        self.around(PendingUpdate, "add", "backward")
        self.around(torch.optim.AdamW, "step", "optimizer")
        self.around(torch.optim.lr_scheduler.LambdaLR, "step", "scheduler")
        self.around(manager, "write", "checkpoint")
        self.around(manager, "prune", "prune")
        self.around(evaluation, "validation_loss", "validation")
        self.around(TextSample, "generate", "sample")
        self.around(model_saver, "save_model", "model")
        self.around(model_saver, "save_adapters", "adapter")
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
            if self.next_is(f"middle of {name}") and self.kill.how != "stop":
                line = as_line(row)
                with (directory.path / name).open("ab") as file:
                    file.write(line[: len(line) // 2])
            self.reach(f"middle of {name}")
            append(directory, name, row)
            self.reach(f"after {name}")

        RunDirectory._append = watched  # type: ignore[method-assign]


def poison() -> None:
    """Make the loss NaN in windows that contain certain samples."""
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


class KillExperiment:
    """A folder of runs that are killed and resumed, with one uninterrupted reference run per kind.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        data = write_jsonl(folder / "data.jsonl", records(40))
        torch.manual_seed(0)
        model = save_model_folder(folder / "base", kind="gpt2", dropout=0.1, layers=1)
        self._settings: dict[str, Any] = {
            "data": str(data), "model": str(model), "device": "cpu", "global_batch": 8, "microbatch": 3, "epochs": 2,
            "lr": 1e-2, "max_length": 32, "checkpoint_every": 3, "validation_every": 4,
        }  # fmt: skip
        self._references: dict[str, Path] = {}
        self._seconds: dict[str, float] = {}
        self._number = 0

    def config(self, kind: str, path: Path) -> TrainConfig:
        settings = self._settings | (KINDS | MORE_KINDS)[kind]
        if settings["data"] == "mixture":
            other = write_jsonl(self.folder / "other.jsonl", records(60)[40:])
            settings["data"] = (self._settings["data"], str(other))
        if settings["data"] in ("pairs", "examples"):
            rows = pairs(40) if settings["data"] == "pairs" else examples(40)
            settings["data"] = str(write_jsonl(self.folder / f"{settings['data']}.jsonl", rows))
        if settings["model"] == "packable":
            settings["model"] = str(self.folder / "packable")
            if not (self.folder / "packable").exists():
                save_model_folder(self.folder / "packable", layers=1)
        return TrainConfig(out=path, **settings)

    def reference(self, kind: str) -> Path:
        """Return the uninterrupted run of this kind; trained at the first call."""
        if kind not in self._references:
            path = self.folder / f"{kind}-reference"
            started_s = time.perf_counter()
            died = self.run_process(kind, path, Kill())
            assert not died, self.log.read_text(encoding="utf-8")
            self._references[kind] = path
            self._seconds[kind] = time.perf_counter() - started_s
        return self._references[kind]

    def points(self, kind: str) -> Counter[str]:
        """Return how often the reference reaches each point."""
        self.reference(kind)
        return Counter(json.loads((self.folder / f"{kind}-reference.json").read_text(encoding="utf-8")))

    def seconds(self, kind: str) -> float:
        """Return an upper bound of the training time of the reference; with its start if it keeps no clock readings."""
        times = [row["elapsed_s"] for row in metrics(self.reference(kind))]
        return self._seconds[kind] if None in times else 2 * sum(times)

    def kill_and_resume(self, kind: str, kills: list[Kill]) -> tuple[int, list[str]]:
        """Kill a run and resume it, once per kill; return the number of kills and the final differences."""
        reference = self.reference(kind)
        self._number += 1
        path = self.folder / f"{kind}-{self._number}"
        num_died = 0
        for kill in (*kills, Kill()):
            died = self.run_process(kind, path, kill)
            if not died:
                break
            num_died += 1
            if kind == "auto" and newest(path / "checkpoints")[0] is not None:
                (path / TUNED_MICROBATCH).unlink(missing_ok=True)  # must be restored from the checkpoint
        return num_died, differences(path, reference)

    def run_process(self, kind: str, path: Path, kill: Kill) -> bool:
        """Start or resume a run in child processes; return whether it was interrupted.

        Raises:
            AssertionError: The run failed without being interrupted.
        """
        if kind in ON_RANKS:
            return self._run_ranks(kind, path, kill)
        began, tell = os.pipe()
        child = os.fork()
        if child == 0:
            status = 70
            try:
                os.close(began)
                status = self._run_in_child(kind, path, kill, tell)
            except (OSError, BigbatchError):
                traceback.print_exc()
                status = 1 if kill.how == "full disk" else 70  # as the command line does
            except BaseException:  # noqa: BLE001 - printed; the child exits here
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        os.close(tell)
        try:
            with os.fdopen(began, "rb") as pipe:
                if pipe.read(1) and kill.after_s < NEVER:
                    time.sleep(kill.after_s)
                    os.kill(child, signal.SIGKILL if kill.how == "kill" else signal.SIGTERM)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise
        finally:
            _, ended = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(ended)
        assert code in (0, CODES[kill.how]), f"ended with {code}: {self.log.read_text(encoding='utf-8')}"
        return code != 0

    def _run_ranks(self, kind: str, path: Path, kill: Kill) -> bool:
        if (path / "config.json").exists():
            words = ["resume", str(path), "--parallel", kind]
        else:
            settings = self.config(kind, path).model_dump(mode="json", exclude_unset=True, exclude_none=True)
            words = ["train"]
            for name, value in settings.items():
                words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        folder = self.folder / "ranks"
        folder.mkdir(exist_ok=True)
        with Launch(words, 2, folder=folder) as launch:
            if kill.after_s < NEVER:
                launch.processes[kill.rank].join(kill.after_s)
                if launch.processes[kill.rank].is_alive():
                    launch.signal(kill.rank, signal.SIGKILL if kill.how == "kill" else signal.SIGTERM)
            codes = launch.wait()
        shown = "".join(launch.stdout(rank) + launch.stderr(rank) for rank in range(2))
        if CODES[kill.how] in codes or (kill.how == "stop" and -signal.SIGTERM in codes):
            return True
        assert codes == [0, 0], f"ended with {codes}: {shown}"
        return False

    def _run_in_child(self, kind: str, path: Path, kill: Kill, began: int) -> int:
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        random.seed(os.urandom(8))
        np.random.seed(random.randrange(2**32))
        torch.manual_seed(random.randrange(2**32))
        points = KillPoints(kill)
        points.watch(began)
        if kind == "poisoned":
            poison()
        if (path / "config.json").exists():
            return resume.run(TrainConfig(), ResumeOptions(run=path))
        code = train.run(self.config(kind, path))
        path.with_name(f"{path.name}.json").write_text(json.dumps(points.counts), encoding="utf-8")
        return code


def serve(experiment: KillExperiment, lines: Any, answer: Callable[[str], None]) -> None:
    """Run the experiment of each line and pass its result to ``answer``."""
    for line in lines:
        asked = json.loads(line)
        kills = [Kill(**kill) for kill in asked["kills"]]
        try:
            died, differs = experiment.kill_and_resume(asked["kind"], kills)
            answer(json.dumps({"died": died, "differs": differs}))
        except AssertionError as error:
            answer(json.dumps({"died": -1, "differs": [str(error)]}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(KillExperiment(Path(sys.argv[1])), sys.stdin, functools.partial(print, flush=True))
