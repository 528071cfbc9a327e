"""Fail on one rank in every window, at random places, and compare each update with plain torch in one process.

    python benchmarks/failing_ranks.py [--failures 200] [--seed 0] [--overlap]      # two minutes on two cores

Two and three gloo ranks, plain replicas and DDP, in turns: windows of `bigbatch.Engine` and of loops over a
`bigbatch.Accumulator`, with uneven shares of the batch, sometimes none. One rank raises in the loss, the forward or the
backward; runs out of memory in the forward, the backward or the reduction; has a loss that is not finite; abandons the
window; raises just before the vote; raises when it makes, launches or waits for one of five buckets of the all-reduce;
or raises in the gradient hook or the optimizer, when the other ranks apply the update.

"dropped" windows changed nothing on any rank, and were run again; "healed" ones were applied at once, with
``--overlap`` also those that failed in the last micro-batch or the reduction, and all ranks ran again; after "noticed"
ones, which the other ranks applied, the next window raised `TornUpdateError` on every rank, and all ranks returned to
their state of before. An update is "equal" if parameters and momentum are the same bits on all ranks, and within 1e-12
of those of plain torch, which trains on the whole batches without failures (float64; a lost or repeated window differs
by more than 1e-3). Exits with 1 if one is not.
"""

import argparse
import os
import platform
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch

from support.failing_ranks import PLACES, Failure, Soak, run_round
from support.process_pool import Pool

KINDS = [(2, "plain"), (3, "plain"), (2, "ddp"), (3, "ddp")]
ROUND = 25  # failures of one kind in a row


def main() -> int:
    """Run rounds of all kinds in turn, and print a line for each place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--failures", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overlap", action="store_true", help="reduce gradients within the last backward")
    options = parser.parse_args()
    print(f"$ python benchmarks/failing_ranks.py {' '.join(sys.argv[1:])}".rstrip())
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}, CPU, gloo")
    started_s = time.perf_counter()
    pools = {size: Pool(size) for size, _ in KINDS}
    rounds: list[tuple[str, Soak]] = []
    try:
        for number, start in enumerate(range(0, options.failures, ROUND)):
            size, how = KINDS[number % len(KINDS)]
            num_updates = min(ROUND, options.failures - start)
            first, *others = pools[size].run(
                run_round, how, num_updates, options.seed + number, options.overlap, timeout_s=300.0
            )
            name = f"{size} ranks, {how}"
            rounds += [(name, first), *((name, Soak(differences=other.differences)) for other in others)]
    finally:
        for pool in pools.values():
            pool.close()
    differences = show(rounds)
    print(f"{time.perf_counter() - started_s:.0f} s")
    return 1 if differences else 0


def show(rounds: list[tuple[str, Soak]]) -> list[str]:
    """Print a line for each place and each kind of ranks; return the differences."""
    failures = [(name, failure) for name, found in rounds for failure in found.failures]
    print(f"{'place of the failure':<28}{'failures':>10}{'dropped':>9}{'healed':>8}{'noticed':>9}")
    for place in PLACES:
        _show_row(place, [failure for _, failure in failures if failure.place == place])
    _show_row("all", [failure for _, failure in failures])
    for name, number in Counter(name for name, _ in failures).items():
        print(f"{name:<28}{number:>10}")
    print(f"{'windows of loops':<28}{sum(failure.in_loop for _, failure in failures):>10}")
    differences = sorted({f"{name}: {text}" for name, found in rounds for text in found.differences})
    print(f"updates equal: {len(failures) - len(differences)} of {len(failures)}")
    print(f"largest relative difference from plain torch: {max(found.largest_error for _, found in rounds):.1e}")
    for sentence in differences:
        print(f"DIFFERS: {sentence}")
    return differences


def _show_row(name: str, failures: list[Failure]) -> None:
    healed = sum(failure.is_healed for failure in failures)
    noticed = sum(failure.is_late for failure in failures)
    dropped = len(failures) - healed - noticed
    print(f"{name:<28}{len(failures):>10}{dropped:>9}{healed:>8}{noticed:>9}")


if __name__ == "__main__":
    sys.exit(main())
