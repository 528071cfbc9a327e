"""Damage run directories in many ways, run every command that reads them, and count what happens.

    python benchmarks/damaged_runs.py [--count 500] [--seed 0] [--kinds NAME ...]

A run of four updates that was killed after the third is copied and damaged: files are deleted, truncated, flipped,
replaced by folders, pipes, links, sockets and devices, and filled with deep, large or invalid JSON; values in JSON
files get other types; manifests are signed again after the damage; checkpoints and files of other runs are copied in;
settings, the base model, its weights and the data are edited; layouts are newer. Then `bigbatch checkpoints`, `report`,
`advise`, `generate` and `resume` run on the directory. "identical" counts the runs that end with the parameters of the
undamaged run, bit for bit; "refused" those that end with one sentence and exit code 2, "failed" with one sentence and
exit code 1; "differs" those that learn something else. In "sealed state" all digests are forged too, and in "earlier
layout" there are fewer: only the types of values can be noticed, so other parameters do not count there, and their runs
are in no column. Exits with 1 if one of the last five columns is not 0.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import transformers

from support.damaged_runs import FORGED, KINDS, DamagedRuns, Outcome

COLUMNS = ("runs", "identical", "refused", "failed", "differs", "tracebacks", "hangs", "outside", "other")


def main() -> int:
    """Damage, run, count and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500, help="damaged runs, distributed over the kinds of damage")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damages")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="kinds of damage (default: all)")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"$ python benchmarks/damaged_runs.py --count {asked.count} --seed {asked.seed}")
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}, "
        f"{platform.system()}, CPU, 1 thread"
    )
    started_s = time.perf_counter()
    table: dict[str, Counter[str]] = defaultdict(Counter)
    with tempfile.TemporaryDirectory() as folder:
        made = DamagedRuns(Path(folder))
        for number in range(asked.count):
            kind = asked.kinds[number % len(asked.kinds)]
            outcome = made.try_damage(kind, Random(f"{asked.seed} {kind} {number}"))
            table[kind].update(counts(kind, outcome))
            for problem in outcome.problems:
                print(f"{number}: {outcome.damage}: {problem}", flush=True)
            if outcome.resumed == "differs" and kind not in FORGED:
                print(f"{number}: {outcome.damage}: other parameters", flush=True)
    total = sum(table.values(), Counter[str]())
    print("".join(f"{name:>11}" for name in COLUMNS) + "   damage")
    for kind, row in [*table.items(), ("all", total)]:
        print("".join(f"{row[name]:>11,}" for name in COLUMNS) + f"   {kind}")
    print(f"{time.perf_counter() - started_s:.0f} s")
    return int(any(total[name] for name in ("differs", "tracebacks", "hangs", "outside", "other")))


def counts(kind: str, outcome: Outcome) -> Counter[str]:
    """Return the columns of one damaged run."""
    found = Counter({"runs": 1})
    if not (outcome.resumed == "differs" and kind in FORGED):
        found[outcome.resumed or "other"] += 1
    for problem in outcome.problems:
        words = {"raises": "tracebacks", "hangs": "hangs", "outside": "outside"}
        found[next((column for word, column in words.items() if word in problem.split()[:4]), "other")] += 1
    return found


if __name__ == "__main__":
    sys.exit(main())
