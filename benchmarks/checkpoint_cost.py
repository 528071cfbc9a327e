"""Cost of checkpoints: the updates of `bigbatch train` without arguments, with a checkpoint every 50 and with none.

    python benchmarks/checkpoint_cost.py [--rounds 5] [--every 50] [--threads 2]

Each round times that many updates of the tiny model on Python's standard library, in alternating order: with a
checkpoint at their end, with one written in the background during the next updates, and with none. The ratio is that
of the median total times; a checkpoint is model, optimizer and random states, hashed, fsynced and renamed, with older
ones verified and all but two removed. Exits with 1 if a checkpoint costs 3 % or more.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch

from bigbatch.lm.checkpoint.manager import CheckpointManager
from bigbatch.lm.checkpoint.run_checkpoint import Progress
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.runs.directory import RunDirectory
from bigbatch.lm.training.setup import set_up_training
from bigbatch.lm.training.trainer import Trainer

MOST = 1.03
WAYS = ("none", "at the end", "background")


class Job:
    """Consecutive updates of one run in a separate folder."""

    def __init__(self, folder: Path) -> None:
        self.trainer = Trainer(set_up_training(TrainConfig(device="cpu", microbatch=8, steps=100_000)))
        self.progress = Progress()
        config = self.trainer.config.model_dump(mode="json")
        self.directories = {way: RunDirectory.create(folder / way, config) for way in WAYS}
        self._windows = self.trainer.schedule.windows(0, 0)

    def update(self) -> None:
        """Run one update."""
        self.trainer.engine.step(self.trainer.fetch(next(self._windows)))
        self.progress.step += 1

    def timed(self, way: str, every: int) -> tuple[float, float]:
        """Return the seconds of ``every`` updates with their checkpoint, and the seconds that they block on it."""
        keeper = CheckpointManager(
            self.directories[way],
            keep=2,
            in_background=way == "background",
            total_steps=self.trainer.total_steps,
            facts=self.trainer.facts,
        )
        with self.directories[way], keeper.open():
            if way == "background":  # the previous checkpoint is written during these updates
                keeper.save(self.trainer.engine, self.progress, "none")
            started_s = time.perf_counter()
            for _ in range(every):
                self.update()
            saving_s = time.perf_counter()
            if way != "none":
                keeper.save(self.trainer.engine, self.progress, "none")
            ended_s = time.perf_counter()
        return ended_s - started_s, ended_s - saving_s


def main() -> int:
    """Time, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--every", type=int, default=50, help="updates between two checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(f"$ python benchmarks/checkpoint_cost.py --rounds {asked.rounds} --every {asked.every}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, CPU, {asked.threads} thread(s)")
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder))
        for _ in range(3):
            job.update()
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for number in range(asked.rounds):
            for way in WAYS[number % 3 :] + WAYS[: number % 3]:
                seconds[way].append(job.timed(way, asked.every))
        checkpoints = sorted((Path(folder) / "at the end" / "checkpoints").iterdir())
        num_bytes = sum(path.stat().st_size for path in checkpoints[-1].iterdir())
    print(f"{asked.every} updates, a checkpoint of {num_bytes / 2**20:.1f} MiB")
    print(f"{'checkpoint':<12}{'s/whole':>9}{'ms waited':>11}{'ratio':>8}")
    whole = {way: statistics.median(total for total, _ in times) for way, times in seconds.items()}
    for way, times in seconds.items():
        waited_ms = 1000 * statistics.median(waited for _, waited in times)
        print(f"{way:<12}{whole[way]:>9.2f}{waited_ms:>11.0f}{whole[way] / whole['none']:>8.3f}")
    return 1 if whole["at the end"] / whole["none"] >= MOST else 0


if __name__ == "__main__":
    sys.exit(main())
