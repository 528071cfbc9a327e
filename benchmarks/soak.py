"""Kill runs, resume them, and compare each with an uninterrupted run.

    python benchmarks/soak.py --minutes 30 [--seed 0]       random interruptions of 16 kinds of runs, for some minutes
    python benchmarks/soak.py --kills 200 [--seed 0]        every named point of 8 kinds, and 200 random moments

Each run has about ten updates over two epochs, with dropout (``packed`` without), and is continued by `bigbatch resume`
until it is finished: the default form, --async-checkpoint, LoRA, bf16 weights and bf16 autocast, automatic and fixed
micro-batches, token budgets padded and packed, a batch in tokens and one that follows a schedule, activation
checkpointing, a checkpoint after every update, windows that are not finite, and two ranks (DDP and FSDP over gloo).

With --minutes each run is interrupted one to three times in a row, thus also while it resumes: by SIGKILL or SIGTERM at
a random moment, or, in one process, at a random occurrence of a named point (all disk operations and the stages of an
update), by SIGKILL, SIGTERM or a disk that is full there. With --kills each point is tested at its first, a middle and
its last occurrence, by SIGKILL.

"equal" counts the runs whose model file, optimizer and random states, lines of metrics and quarantine (without clock
readings), and learning rates are bit-identical to those of the uninterrupted run; "different" the others. Exits with 1
if there is one; Ctrl-C prints the table so far. The seed determines which interruptions are tried, not what a process
does at a random moment. Requires a system with fork.
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

from support.kill_points import KINDS, MORE_KINDS, ON_RANKS, Kill, KillExperiment

MOST_IN_A_ROW = 10
DISK = ("fsync", "rename", "mkdir", "write")
"""Points at which a disk can be full."""


def main() -> int:
    """Interrupt, resume, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="interrupt runs of all kinds at random for so long")
    length.add_argument("--kills", type=int, help="all named points, and so many random moments over the kinds of runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the interruptions")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"$ python benchmarks/soak.py {' '.join(sys.argv[1:])}")
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}, "
        f"{platform.system()}, CPU, 1 thread"
    )
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        table = Table(KillExperiment(Path(folder)), started_s)
        moments = random.Random(asked.seed)
        try:
            if asked.minutes is None:
                everywhere(table, moments, asked.kills)
            else:
                soak(table, moments, until_s=started_s + 60 * asked.minutes)
        except KeyboardInterrupt:
            print("\ninterrupted by Ctrl-C; so far:")
    table.show()
    print(f"{time.perf_counter() - started_s:.0f} s")
    return 1 if table.wrong else 0


class Table:
    """Counts of runs, kills and equal results by row."""

    def __init__(self, experiment: KillExperiment, started_s: float) -> None:
        self.experiment = experiment
        self.wrong: list[str] = []
        self._started_s = started_s
        self._runs: Counter[str] = Counter()
        self._kills: Counter[str] = Counter()
        self._equal: Counter[str] = Counter()

    def kill_and_resume(self, row: str, kind: str, kills: list[Kill]) -> None:
        """Run once through the given kills, count the result, and show progress on a terminal."""
        try:
            num_died, differs = self.experiment.kill_and_resume(kind, kills)
        except AssertionError as error:  # it ended with another exit code
            lines = str(error).strip().splitlines()
            num_died, differs = 0, [f"{lines[0]} … {lines[-1]}"]
        self._runs[row] += 1
        self._kills[row] += num_died
        self._equal[row] += not differs
        if differs:
            self.wrong.append(f"{kind}, {row}, {kills}: {', '.join(differs)}")
        if sys.stderr.isatty():
            seconds = time.perf_counter() - self._started_s
            counts = f"{self._runs.total()} runs, {self._kills.total()} kills, {len(self.wrong)} different"
            print(f"\r{seconds:6.0f} s: {counts} ({row})\x1b[K", end="", file=sys.stderr, flush=True)

    def show(self) -> None:
        """Print a line for each row, the total, and the differences."""
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        print(f"{'kind or point':<32}{'runs':>6}{'kills':>7}{'equal':>7}{'different':>11}")
        for row in self._runs:
            self._show_row(row, self._runs[row], self._kills[row], self._equal[row])
        self._show_row("all", self._runs.total(), self._kills.total(), self._equal.total())
        for sentence in self.wrong:
            print(f"DIFFERS: {sentence}")

    def _show_row(self, row: str, runs: int, kills: int, equal: int) -> None:
        print(f"{row:<32}{runs:>6}{kills:>7}{equal:>7}{runs - equal:>11}")


def soak(table: Table, moments: random.Random, *, until_s: float) -> None:
    """Interrupt runs of all kinds in turn until the time is over; every kind at least once."""
    kinds = [*KINDS, *MORE_KINDS]
    number = 0
    while number < len(kinds) or time.perf_counter() < until_s:
        kind = kinds[number % len(kinds)]
        kills = [any_kill(table, kind, moments) for _ in range(moments.choice((1, 1, 2, 3)))]
        table.kill_and_resume(kind, kind, kills)
        number += 1


def any_kill(table: Table, kind: str, moments: random.Random) -> Kill:
    """Choose an interruption: a random moment, or a random occurrence of a random point."""
    how = moments.choice(("kill", "kill", "kill", "stop"))
    if kind in ON_RANKS or moments.random() < 0.5:
        after_s = moments.random() * table.experiment.seconds(kind)
        return Kill(after_s=after_s, how=how, rank=moments.randrange(2))
    points = table.experiment.points(kind)
    point = moments.choice(sorted(points))
    number = moments.randint(1, points[point])
    if point.partition(" ")[2] in DISK and moments.random() < 0.3:
        how = "full disk"
    return Kill(point, number, how=how)


def everywhere(table: Table, moments: random.Random, num_random: int) -> None:
    """Kill at all named points, at random moments, and many times in a row."""
    for kind in KINDS:
        named_points(table, kind)
    for number in range(num_random):
        random_moment(table, list(KINDS)[number % len(KINDS)], moments)
    for kind in KINDS:
        many_in_a_row(table, kind, moments)


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
