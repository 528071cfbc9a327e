"""Cost and savings of planning: seconds, micro-batches against the bound, and padding compared with other methods.

    python benchmarks/planning.py [--budget 8192] [--ranks 8] [--rounds 5]

Lengths are log-normal between 32 and 2,048, with a median of 270 and a mean near 360. Seconds are the minimum over the
rounds. No packing has fewer than ⌈tokens / budget⌉ micro-batches. Costs are those of the default `Cost`, relative to
the lowest in the table: the relative time of an update under that cost model.
"""

import argparse
import math
import platform
import random
import time
from collections.abc import Iterable, Sequence

from bigbatch.batching.packing import cut_cheapest, cut_full, pack_best_fit
from bigbatch.batching.plan import Plan, plan
from bigbatch.batching.sorted_batch import Cost, SortedBatch

SIZE = 8  # samples of a micro-batch of fixed size


def heavy_tailed(number: int, seed: int = 0) -> list[int]:
    """Return lengths distributed as in web text, in random order."""
    source = random.Random(seed)
    return [min(2048, max(32, int(math.exp(source.gauss(0, 1) * 0.8 + 5.6)))) for _ in range(number)]


def timed(lengths: Sequence[int], rounds: int, **options: object) -> tuple[Plan, float]:
    """Return the plan, and the seconds of the fastest round."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        made = plan(lengths, **options)
        seconds.append(time.perf_counter() - start)
    return made, min(seconds)


def time_planning(budget: int, ranks: int, rounds: int) -> None:
    """Print the planning time by number of samples, layout and ranks."""
    print(f"Planning, token budget {budget:,}\n")
    print(f"{'samples':>8} {'layout':>7} {'ranks':>5} {'seconds':>8} {'micro-batches':>14} {'bound':>7} {'fill':>7}")
    for number in (256, 1_000, 10_000, 100_000):
        lengths = heavy_tailed(number)
        bound = -(-sum(lengths) // budget)
        for layout in ("padded", "packed"):
            for size in (1, ranks):
                made, seconds = timed(lengths, rounds, token_budget=budget, layout=layout, data_parallel_size=size)
                count = sum(bool(microbatch) for rank in made.microbatches for microbatch in rank)
                print(f"{number:8,} {layout:>7} {size:5} {seconds:8.3f} {count:14,} {bound:7,} {made.fill:7.1%}")
    print()


def compare(number: int, budget: int) -> None:
    """Print padding, count and modelled cost of five ways to cut the same samples for one rank."""
    lengths = heavy_tailed(number)
    longest_first = sorted(lengths, reverse=True)
    max_rows = [budget // length for length in longest_first]
    row_costs = [Cost().of_row(length) for length in longest_first]
    cheapest = cut_cheapest(row_costs, max_rows, per_group=Cost().per_microbatch)
    ways: list[tuple[str, Iterable[Sequence[int]], list[int], bool]] = [
        (f"{SIZE} samples, as they come", fixed(number), lengths, False),
        (f"{SIZE} samples, sorted", fixed(number), longest_first, False),
        ("token budget, filled up", cut_full(max_rows), longest_first, False),
        ("token budget, cheapest cut", cheapest, longest_first, False),
        ("token budget, packed", pack_best_fit(longest_first, budget), longest_first, True),
    ]
    rows = []
    for name, groups, order, packed in ways:
        grouped = [sorted((order[i] for i in group), reverse=True) for group in groups]
        batches = [SortedBatch(group, budget, None, packed, Cost()) for group in grouped]
        sizes = [batch.tokens_of(range(len(batch.lengths))) for batch in batches]
        costs = [batch.cost_of(range(len(batch.lengths))) for batch in batches]
        rows.append((name, len(sizes), max(sizes), 1 - sum(lengths) / sum(sizes), sum(costs)))
    least = min(cost for *_, cost in rows)
    print(f"{number:,} samples, {sum(lengths):,} tokens, token budget {budget:,}\n")
    print(f"{'way':<28} {'micro-batches':>14} {'largest':>9} {'waste':>7} {'cost':>7}")
    for name, count, largest, waste, cost in rows:
        print(f"{name:<28} {count:14,} {largest:9,} {waste:7.1%} {cost / least:7.3f}")
    print()


def fixed(number: int) -> list[range]:
    """Return consecutive samples, ``SIZE`` at a time."""
    return [range(start, min(start + SIZE, number)) for start in range(0, number, SIZE)]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=8192, help="tokens of a micro-batch, at least 2,048")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, {platform.machine()}, one core\n")
    time_planning(options.budget, options.ranks, options.rounds)
    for number in (256, 10_000):
        compare(number, options.budget)


if __name__ == "__main__":
    main()
