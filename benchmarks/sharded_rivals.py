"""A Llama of 8 billion parameters in shards over the cards of one host: tokens per second of bigbatch and torchtitan.

    torchrun --standalone --nproc-per-node 4 benchmarks/sharded_rivals.py [--layers 32] [--rows 4] [--microbatches 2]
        [--rounds 3] [--checkpointing full] [--only bigbatch,torchtitan] [--profile] [--out FILE]
    torchrun --standalone --nproc-per-node 2 benchmarks/sharded_rivals.py --dry         # a tiny Llama, on the CPU

Both train the shape of Llama 3 8B with FSDP2: float32 shards, computation in bfloat16, gradients reduced in float32,
compiled layers, fused AdamW, clipping, the same activation checkpointing, and on every rank the same micro-batches of
full rows of 2,048 random tokens, so that packing is no advantage. ``bigbatch`` does what `bigbatch train --parallel
fsdp` does, with a micro-batch that is set and not chosen. ``torchtitan`` is the model of torchtitan 0.2.2 with its
`apply_ac`, `apply_compile`, `apply_fsdp`, loss, clipping and training step. ``bigbatch-last`` always keeps whole
gradients until the last micro-batch, and ``torchtitan-never`` frees no weights after forward
(``fsdp_reshard_after_forward``).

All contestants stay in memory, and their updates alternate: in every round each runs one update that is not timed and
one that is. The last lines are a table of medians. After ``--limit`` seconds the script prints what it has and exits.
"""

import argparse
import faulthandler
import gc
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(TORCHINDUCTOR_COMPILE_THREADS="8")  # each rank starts so many processes

import torch
import torch.distributed as dist

from bigbatch.lm.bench.flops import MATRIX_FLOPS_PER_S, update_flops
from bigbatch.lm.distributed.ranks import RankContext
from bigbatch.lm.model.meta_model import meta_model_from_config
from sharded_contestants import CONTESTANTS, LLAMA_8B, TINY, Job

STARTED_S = time.perf_counter()
ROW_TOKENS, ROW_TOKENS_DRY = 2_048, 64
WARM_UPDATES = 2
TABLE = "{:<18}{:>12}{:>8}{:>10}{:>17}"


@dataclass
class Row:
    """What was measured of a contestant."""

    name: str
    notes: list[str] = field(default_factory=list)
    first_update_s: float = 0.0
    peak_gib: float = 0.0
    seconds: list[float] = field(default_factory=list)
    error: str | None = None


class Comparison:
    """The turns of all contestants; ranks agree after each of them whether it failed."""

    def __init__(self, job: Job, names: Sequence[str], heading: str, out: Path | None) -> None:
        self.job = job
        self.rows = [Row(name) for name in names]
        self._alive: dict[str, Any] = {}
        self._heading, self._out = heading, out
        model = meta_model_from_config(job.llama_config(), dtype=torch.float32)
        self._flops = job.ranks.size * update_flops(model, job.window(0))
        self._updates = 0

    def run(self, rounds: int) -> None:
        """Build and warm up each contestant, then alternate."""
        for row in self.rows:
            self._attempt(row, partial(self._start, row))
        for number in range(rounds):
            for row in self.rows:
                if row.name in self._alive:
                    self._attempt(row, partial(self._round, row, number))

    def profile(self) -> None:
        """Print the kernels of one more update of each contestant, on rank 0."""
        for row in self.rows:
            if row.name not in self._alive:
                continue
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
                elapsed_s = self._update(self._alive[row.name])
            if not self.job.ranks.rank:
                table = found.key_averages().table(
                    sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=90
                )
                print(f"{row.name}: {elapsed_s:.3f} s with the profiler", table, sep="\n", flush=True)

    def report(self) -> None:
        """Print and write the table, on rank 0."""
        if self.job.ranks.rank:
            return
        lines = [self._heading, *self._details(), "", *self._table()]
        print("\n".join(lines), flush=True)
        if self._out is not None:
            self._out.write_text("\n".join(lines) + "\n")

    def _start(self, row: Row) -> None:
        started_s = time.perf_counter()
        before_bytes = self._memory(reset=True)
        self.log(f"{row.name}: building")
        contestant = CONTESTANTS[row.name](self.job)
        self._alive[row.name] = contestant
        row.notes = [f"{contestant.parameters:,} parameters; {contestant.notes[0]}", *contestant.notes[1:]]
        self.log(f"{row.name}: {row.notes[0]}; first update")
        for number in range(WARM_UPDATES):
            elapsed_s = self._update(contestant)
            if not number:
                row.first_update_s = time.perf_counter() - started_s
                row.notes.append(f"first update: {contestant.last_update()}")
                self._memory(reset=True)
            self.log(f"{row.name}: update {number}: {elapsed_s:.2f} s")
        own_gib = (self._memory(peak=True) - before_bytes) / 2**30
        row.peak_gib = max(self.job.ranks.all_gather(own_gib))

    def _round(self, row: Row, number: int) -> None:
        contestant = self._alive[row.name]
        self._update(contestant)
        row.seconds.append(self._update(contestant))
        self.log(f"round {number}: {row.name} {self.job.tokens / row.seconds[-1]:,.0f} tokens/s")

    def _update(self, contestant: Any) -> float:
        """Run one update, and return the seconds of the slowest rank."""
        window = self.job.window(self._updates)
        self._updates += 1
        self._synchronize()
        self.job.ranks.all_gather(None)  # all ranks begin together
        started_s = time.perf_counter()
        contestant.update(window)
        self._synchronize()
        return float(max(self.job.ranks.all_gather(time.perf_counter() - started_s)))

    def _attempt(self, row: Row, action: Callable[[], None]) -> None:
        """Run an action of a contestant; drop the contestant on all ranks if it fails on any."""
        error = None
        try:
            action()
        except Exception as raised:  # noqa: BLE001 - it becomes the row of the contestant
            traceback.print_exc()
            first_line = (str(raised).strip() or "no message").splitlines()[0]
            error = f"{type(raised).__name__}: {first_line}"[:200]
        errors = [each for each in self.job.ranks.all_gather(error) if each is not None]
        if errors:
            row.error = errors[0]
            self._alive.pop(row.name, None)
            self.log(f"{row.name} failed: {row.error}")
            gc.collect()
            if self.job.on_cuda:
                torch.cuda.empty_cache()

    def _table(self) -> list[str]:
        job, lines = self.job, [TABLE.format("", "tokens/s", "share", "peak GiB", "first update")]
        speeds = {}
        for row in self.rows:
            if row.seconds:
                median_s = statistics.median(row.seconds)
                speeds[row.name] = job.tokens / median_s
                share = self._flops / median_s / job.ranks.size / MATRIX_FLOPS_PER_S["NVIDIA H200"]
                numbers = (f"{speeds[row.name]:,.0f}", f"{share:.3f}" if job.on_cuda else "-", f"{row.peak_gib:.1f}")
                lines.append(TABLE.format(row.name, *numbers, f"{row.first_update_s:.1f} s"))
            if row.error is not None or not row.seconds:
                lines.append(f"{row.name:<18}{row.error or 'not measured'}")
        ours, theirs = ([name for name in speeds if name.startswith(who)] for who in ("bigbatch", "torchtitan"))
        for name in ours:
            lines += [f"{name} is × {speeds[name] / speeds[other]:.3f} of {other}" for other in theirs]
        return lines

    def _details(self) -> list[str]:
        job = self.job
        lines = [
            f"tokens/s: over all cards, median of the rounds, of whole updates of {job.tokens:,} tokens; peak: of the "
            "rank with the most, without the memory of the other contestants; first update: from the start of building",
            f"share: of 790 TFLOP/s per card, the rate of large bf16 matrix products on one H200; counted are "
            f"{self._flops / job.tokens / 1e9:.2f} GFLOP per token: 6 for each weight, without the embedding, and "
            "those of causal attention, but no recomputation",
        ]
        lines += [f"{row.name}: {note}" for row in self.rows for note in row.notes]
        for row in self.rows:
            speeds = " ".join(f"{job.tokens / seconds:,.0f}" for seconds in row.seconds)
            lines.append(f"{row.name}: tokens/s of each round: {speeds or 'none'}")
        return lines

    def log(self, words: str) -> None:
        """Print progress, on rank 0."""
        if not self.job.ranks.rank:
            print(f"[{time.perf_counter() - STARTED_S:6.1f} s] {words}", file=sys.stderr, flush=True)

    def _memory(self, *, reset: bool = False, peak: bool = False) -> int:
        if not self.job.on_cuda:
            return 0
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()

    def _synchronize(self) -> None:
        if self.job.on_cuda:
            torch.cuda.synchronize()


def exit_at(limit_s: float, comparison: Comparison) -> None:
    """Print what was measured and end the process after some seconds, also if it waits for another rank by then."""

    def stop() -> None:
        comparison.log(f"stopped at the limit of {limit_s:.0f} s")
        if not comparison.job.ranks.rank:
            faulthandler.dump_traceback(all_threads=True)
        comparison.report()
        if comparison.job.ranks.rank:
            time.sleep(3)  # torchrun ends all ranks when one has exited
        os._exit(3)

    timer = threading.Timer(max(1.0, limit_s - (time.perf_counter() - STARTED_S)), stop)
    timer.daemon = True
    timer.start()


def main() -> None:
    """Compare, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=LLAMA_8B.layers, help="fewer for fewer cards: 16 for 2 of an H200"
    )
    parser.add_argument("--rows", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--microbatches", type=int, default=2, help="of an update, on every rank")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpointing", choices=("none", "full"), default="full", help="of activations")
    parser.add_argument("--only", default="bigbatch,torchtitan", help=f"some of {', '.join(CONTESTANTS)}")
    parser.add_argument(
        "--limit", type=float, default=120, help="seconds after which the script exits, without imports"
    )
    parser.add_argument("--out", type=Path, help="file for the table")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one more update of each")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU over gloo, uncompiled, in float32")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in CONTESTANTS]:
        parser.error(f"{', '.join(unknown)} is not one of {', '.join(CONTESTANTS)}")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cpu") if options.dry else torch.device("cuda", local_rank)
    if not options.dry:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if options.dry else "cpu:gloo,cuda:nccl")
    torch.manual_seed(rank)
    job = Job(
        RankContext(size, rank, size, "fsdp"),
        device,
        TINY if options.dry else replace(LLAMA_8B, layers=options.layers),
        ROW_TOKENS_DRY if options.dry else ROW_TOKENS,
        options.rows,
        options.microbatches,
        options.checkpointing,
    )
    card = "CPU" if options.dry else torch.cuda.get_device_name(device)
    heading = (
        f"{size} {card}, torch {torch.__version__}, transformers {version('transformers')}; {job.shape.layers} layers; "
        f"on each rank {job.microbatches} micro-batches of {job.rows} rows of {job.row_tokens:,} tokens"
    )
    comparison = Comparison(job, names, heading, options.out)
    comparison.log(heading)
    exit_at(options.limit, comparison)
    comparison.run(options.rounds)
    if options.profile:
        comparison.profile()
    comparison.report()
    job.ranks.all_gather(None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
