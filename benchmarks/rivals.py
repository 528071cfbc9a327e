"""bigbatch compared with the fastest loops known: torchtitan, and loops written by hand for this one model.

    python benchmarks/rivals.py --workload w --memory 24GiB [--rounds 3] [--only NAMES] [--out FOLDER]
    python benchmarks/rivals.py --dry

On one H200 or H100: w with --memory 24GiB and with --memory none about six minutes each, w-1.5b and w-7b-lora less than
five. The updates of all contestants alternate, and each starts from the same weights; the last table has the medians.
Besides the contestants of `bigbatch bench` there are ``bigbatch-torch``, with the attention kernel of torch
(``bigbatch`` uses FlashAttention-4 where that is installed and faster), ``bigbatch-bf16-logits``, with ``--logits
bf16``, ``bigbatch-fp8``, with ``--precision fp8``, a less exact gradient, and ``bigbatch-by-hand:N``, with
a micro-batch that is set and not chosen; `hand_tuned.py` compares such sizes alone. N is rows of 2,048 tokens per
micro-batch. With ``--dry`` a small workload runs on the CPU, uncompiled.

The table and every measurement are written to rivals-WORKLOAD-LIMIT-DEVICE.txt in the folder.
"""

import argparse
import dataclasses
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bigbatch.cli.commands.bench import describe
from bigbatch.lm.bench.benchmark import BenchmarkResult, ContestantResult, run_benchmark
from bigbatch.lm.bench.bigbatch_runner import BigbatchRunner
from bigbatch.lm.bench.entries import OURS, Entry, read_entry
from bigbatch.lm.bench.peer import Contestant
from bigbatch.lm.bench.registry import make_contestant
from bigbatch.lm.bench.workload import W_SMALL, WORKLOADS, Workload

WITH_TORCH = "bigbatch-torch"
NARROW_LOGITS = "bigbatch-bf16-logits"
FP8 = "bigbatch-fp8"
BY_HAND = "bigbatch-by-hand"
ROW_TOKENS = 2_048
DRY = dataclasses.replace(W_SMALL, sequences=6)
BOTH = f"{OURS},{WITH_TORCH}"
DEFAULTS = {
    ("w", True): f"{BOTH},torchtitan:2,torchtitan:3,torchtitan-varlen:3,hand-written:3,hand-written-sdpa:3",
    ("w", False): f"{BOTH},torchtitan:4,torchtitan:8,torchtitan-varlen:4,hand-written:6,hand-written-sdpa:4",
    ("w-1.5b", True): f"{OURS},torchtitan:2,hand-written:2",
    ("w-1.5b", False): f"{OURS},torchtitan:4,hand-written:6",
    ("w-7b-lora", True): f"{OURS},hand-written:2",
    ("w-7b-lora", False): f"{OURS},hand-written:4",
    ("w-small", False): f"{BOTH},torchtitan:2,hand-written:2,hand-written-sdpa:2",
}
"""Contestants by workload and whether memory is limited, with sizes that fit."""


def entries_of(text: str) -> list[Entry]:
    """Parse the names of contestants."""
    entries = []
    for name in text.split(","):
        if name in (WITH_TORCH, NARROW_LOGITS, FP8):
            entries.append(Entry(name, None))
        elif name.startswith(f"{BY_HAND}:"):
            entries.append(Entry(BY_HAND, int(name.removeprefix(f"{BY_HAND}:"))))
        else:
            entries.append(read_entry(name))
    return entries


def make(entry: Entry) -> Contestant:
    """Create a contestant."""
    if entry.name == WITH_TORCH:
        return BigbatchRunner(attention="torch")
    if entry.name == NARROW_LOGITS:
        return BigbatchRunner(logits="bf16")
    if entry.name == FP8:
        return BigbatchRunner(precision="fp8")
    if entry.name == BY_HAND:
        assert entry.samples is not None, "parsed with its rows"
        return BigbatchRunner(tokens=entry.samples * ROW_TOKENS)
    return make_contestant(entry)


def title(row: ContestantResult) -> str:
    """Return the name of a row, with its rows per micro-batch."""
    return row.name if row.samples is None else f"{row.name}:{row.samples}"


def measurements(result: BenchmarkResult) -> Iterator[str]:
    """Yield every speed of every contestant, in the order of the rounds."""
    yield "tokens/s of each round:"
    for row in result.rows:
        yield f"  {title(row):<24}{' '.join(f'{speed:,.0f}' for speed in row.speeds) or row.problem}"


def short_table(result: BenchmarkResult) -> Iterator[str]:
    """Yield one line per contestant, and the ratio of bigbatch to the best of each kind of rival."""
    yield f"{'':<24}{'tokens/s':>10}{'share':>8}{'GiB':>8}{'cosine':>10}{'first update':>15}"
    for row in result.rows:
        if row.tokens_per_s is None or row.similarity is None:
            yield f"{title(row):<24}  {row.problem}"
            continue
        share, peak = result.share(row), row.peak_bytes
        yield (
            f"{title(row):<24}{row.tokens_per_s:>10,.0f}{'–' if share is None else f'{share:.3f}':>8}"
            f"{'–' if peak is None else f'{peak / 2**30:.1f}':>8}{row.similarity.cosine:>10.5f}"
            f"{'–' if row.first_update_s is None else f'{row.first_update_s:.1f} s':>15}"
        )
    ours = result.ours
    for kind in ("torchtitan", "hand-written"):
        rivals = [row for row in result.rows if row.name.startswith(kind) and row.tokens_per_s is not None]
        if ours is None or not ours.speeds or not rivals:
            continue
        best = max(rivals, key=lambda row: statistics.median(row.speeds))
        yield f"bigbatch is × {result.ratio(best):.3f} of {title(best)}, the fastest {kind}"


def main() -> None:
    """Run the comparison, and write its file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=["w", "w-1.5b", "w-7b-lora"], default="w")
    parser.add_argument(
        "--memory", default="none", help="limit of this process, such as 24GiB; none for the whole card"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed updates of each contestant")
    parser.add_argument("--only", help="contestants, separated by commas")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the file")
    parser.add_argument("--dry", action="store_true", help="a small workload on the CPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)  # fails now, not after the measurements
    workload: Workload = DRY if options.dry else WORKLOADS[options.workload]
    memory = None if options.memory == "none" else options.memory
    rivals = DEFAULTS[workload.name, memory is not None and not options.dry]
    entries = entries_of(options.only or rivals)
    torch._dynamo.config.recompile_limit = 64  # every contestant compiles the same code of transformers and torchtitan
    started_s = time.perf_counter()

    def progress(activity: str, done: int = 0, total: int = 0) -> None:
        print(f"[{time.perf_counter() - started_s:6.1f} s] {activity}", file=sys.stderr)

    progress(f"torch {torch.__version__}")
    result = run_benchmark(workload, entries, memory=memory, rounds=options.rounds, progress=progress, make=make)
    progress("done")
    lines = [
        f"$ python benchmarks/rivals.py {shlex.join(sys.argv[1:])}",
        *describe(result),
        "",
        *measurements(result),
        "",
        *short_table(result),
    ]
    on_cuda = result.device_spec.device.type == "cuda"
    device = torch.cuda.get_device_name().split()[1].lower() if on_cuda else "cpu"
    path = options.out / f"rivals-{workload.name}-{(memory or 'unlimited').lower()}-{device}.txt"
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print("", *lines, sep="\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
