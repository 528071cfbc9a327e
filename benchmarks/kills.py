"""Kill runs, resume them, and compare each with an uninterrupted run: at every named point and at random moments.

    python benchmarks/kills.py [--kills 200] [--seed 0]

A run of about ten updates over two epochs, with dropout, is killed with SIGKILL and then resumed by one `bigbatch
resume`: in its default form and with --async-checkpoint, LoRA, bf16 weights, an automatic micro-batch, a batch in
tokens, and with windows that are not finite. The points are all its disk operations and the stages of an update; each
point is tested at its first, a middle and its last occurrence. "equal" counts the runs whose model, optimizer and
random states, lines of metrics and quarantine, and learning rates are bit-identical to those of the uninterrupted run.
Exits with 1 if one differs. Requires a system with fork.
"""

import argparse
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import transformers

from support.kill_points import KINDS, Kill, KillExperiment

MOST_IN_A_ROW = 10


def main() -> int:
    """Kill, resume, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="random moments, distributed over the kinds of runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"$ python benchmarks/kills.py --kills {asked.kills} --seed {asked.seed}")
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}, "
        f"{platform.system()}, CPU, 1 thread"
    )
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        table = Table(KillExperiment(Path(folder)))
        moments = random.Random(asked.seed)
        for kind in KINDS:
            named_points(table, kind)
        for number in range(asked.kills):
            random_moment(table, list(KINDS)[number % len(KINDS)], moments)
        for kind in KINDS:
            many_in_a_row(table, kind, moments)
    table.show()
    print(f"{time.perf_counter() - started_s:.0f} s")
    return 1 if table.wrong else 0


class Table:
    """Counts of runs, kills and equal results by kill point."""

    def __init__(self, experiment: KillExperiment) -> None:
        self.experiment = experiment
        self.wrong: list[str] = []
        self._runs: Counter[str] = Counter()
        self._kills: Counter[str] = Counter()
        self._equal: Counter[str] = Counter()

    def kill_and_resume(self, row: str, kind: str, kills: list[Kill]) -> None:
        """Run once through the given kills and count the result."""
        num_died, differs = self.experiment.kill_and_resume(kind, kills)
        self._runs[row] += 1
        self._kills[row] += num_died
        self._equal[row] += not differs
        if differs:
            self.wrong.append(f"{kind}, {row}, {kills}: {', '.join(differs)}")

    def show(self) -> None:
        """Print a line for each point, the total, and the differences."""
        print(f"{'point':<32}{'runs':>6}{'kills':>7}{'equal':>7}")
        for row in self._runs:
            print(f"{row:<32}{self._runs[row]:>6}{self._kills[row]:>7}{self._equal[row]:>7}")
        print(f"{'all':<32}{self._runs.total():>6}{self._kills.total():>7}{self._equal.total():>7}")
        for sentence in self.wrong:
            print(f"DIFFERS: {sentence}")


def named_points(table: Table, kind: str) -> None:
    """Kill at the first, a middle and the last occurrence of each point."""
    for point, times in table.experiment.points(kind).items():
        for number in sorted({1, (times + 1) // 2, times}):
            table.kill_and_resume(point, kind, [Kill(point, number)])


def random_moment(table: Table, kind: str, moments: random.Random) -> None:
    """Kill once at a random moment of the training."""
    table.kill_and_resume(
        f"any moment, {kind}", kind, [Kill(after_s=moments.random() * table.experiment.seconds(kind))]
    )


def many_in_a_row(table: Table, kind: str, moments: random.Random) -> None:
    """Kill one run ten times in a row, each time after another fraction of its duration."""
    seconds = table.experiment.seconds(kind)
    kills = [Kill(after_s=moments.random() * seconds / 2) for _ in range(MOST_IN_A_ROW)]
    table.kill_and_resume("up to ten in a row", kind, kills)


if __name__ == "__main__":
    sys.exit(main())
