"""One batch of W over several cards: the time of every update, and where it goes.

    torchrun --standalone --nproc-per-node 4 benchmarks/small_windows.py [--updates 30] [--budget 12288]
        [--how alone,ddp,fsdp,fsdp-kept,fsdp-every] [--batches 1] [--profile]

On CUDA cards of one host with NCCL. Every update has other lengths: the window of W with another seed, dealt over the
ranks as `bigbatch train` does. ``alone``: rank 0 runs the same windows, and the others wait. ``ddp``, ``fsdp``: all
ranks do, as in `bigbatch train`: ``fsdp`` gathers weights and reduces gradients once a window if both fit;
``fsdp-kept`` reduces gradients with every micro-batch; ``fsdp-every`` also gathers weights, in float32, for every
micro-batch, as FSDP does by default. ``--batches 4`` makes each window as large as so many batches of W. The tables
have the milliseconds of each update, the graphs that were captured in it, and medians over the second half. ``--cpu``
runs the small workload over gloo, to try the script.
"""

import argparse
import gc
import os
import statistics
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from bigbatch import TokenBudget
from bigbatch.distributed.sharded import ShardedSync
from bigbatch.lm.bench.bigbatch_runner import set_up
from bigbatch.lm.bench.workload import W_SMALL, W, shift
from bigbatch.lm.distributed.ranks import SINGLE_PROCESS, RankContext
from bigbatch.lm.training.engine_factory import make_engine


def windows(workload: Any, number: int, batches: int) -> list[list[dict[str, torch.Tensor]]]:
    """Return the samples of each window; the first one begins with that of the workload."""
    return [
        shift(
            [
                {"input_ids": ids, "labels": ids}
                for part in range(batches)
                for ids in workload.make_sequences(seed=seed * batches + part)
            ]
        )
        for seed in range(number)
    ]


def run(
    workload: Any, ranks: RankContext, how: str, device: torch.device, arguments: argparse.Namespace
) -> list[dict[str, float]]:
    """Run the updates, and return what each took."""
    model = workload.make_model(device)
    model_setup = set_up(model, workload)
    sync: Any = None
    dtype = workload.device_spec().gathered_dtype
    if how == "fsdp-every":
        ranks.parallelize(model, device)
        sync = ShardedSync(model, keeps_weights=False)
    elif how == "fsdp-kept":
        ranks.parallelize(model, device, layers_dtype=dtype)
        sync = ShardedSync(model, keeps_weights=True)
    elif how != "alone":
        sync = ranks.parallelize(model, device, layers_dtype=dtype)
    if ranks.are_sharded:
        model_setup = replace(model_setup, uses_cuda_graphs=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=workload.lr, fused=device.type == "cuda")
    engine = make_engine(model_setup, optimizer, microbatch=TokenBudget(arguments.budget), sync=sync)
    rows = []
    for number, window in enumerate(windows(workload, arguments.updates, arguments.batches)):
        lengths = [len(sample["input_ids"]) for sample in window]
        own = [window[i] for i in ranks.shard_window(range(len(window)), lengths)]
        if ranks.are_sharded and not number:
            shortest = model_setup.collate([min(own, key=lambda sample: len(sample["input_ids"]))])
            sync.set_padding_microbatch({name: tensor.to(device) for name, tensor in shortest.items()})
        before = getattr(engine.runner, "num_graphs", 0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        started_s = time.perf_counter()
        profiling = arguments.profile and number == arguments.updates - 1 and ranks.rank == 0
        with torch.profiler.profile() if profiling else nullcontext() as profiler:
            report = engine.step(own)
            if device.type == "cuda":
                torch.cuda.synchronize()
        elapsed_s = time.perf_counter() - started_s
        if profiling:
            averages = profiler.key_averages()
            print(averages.table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=50))
            print(averages.table(sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=50))
        rows.append(
            {
                "ms": 1000 * elapsed_s,
                "tokens": sum(lengths),
                "own": sum(len(sample["input_ids"]) for sample in own),
                "microbatches": report.num_microbatches,
                "captured": getattr(engine.runner, "num_graphs", 0) - before,
            }
        )
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        engine.release_cuda_graphs()
        if ranks.rank == 0:
            print(f"peak {peak:.1f} GiB")
    return rows


def show(title: str, rows: list[dict[str, float]]) -> float:
    """Print a table, and return the tokens per second of the second half."""
    print(f"\n{title}\n{'update':>6} {'ms':>8} {'micro-batches':>13} {'own tokens':>10} {'captured':>8}")
    for number, row in enumerate(rows):
        print(f"{number:6} {row['ms']:8.1f} {row['microbatches']:13} {row['own']:10,} {row['captured']:8}")
    later = rows[len(rows) // 2 :]
    speeds = [1000 * row["tokens"] / row["ms"] for row in later]
    speed = statistics.median(speeds)
    print(f"median of the second half: {speed:,.0f} tokens/s, {statistics.median(row['ms'] for row in later):.0f} ms")
    return speed


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--budget", type=int, default=12_288)
    parser.add_argument("--how", default="alone,ddp,fsdp,fsdp-kept,fsdp-every")
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu") if arguments.cpu else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if not arguments.cpu:
        torch.cuda.set_device(device)
    workload = W_SMALL if arguments.cpu else W
    dist.init_process_group("gloo" if arguments.cpu else "nccl", device_id=None if arguments.cpu else device)
    speeds: dict[str, float] = {}
    for how in arguments.how.split(","):
        ranks = SINGLE_PROCESS
        if how != "alone":
            ranks = RankContext(size, rank, size, "ddp" if how == "ddp" else "fsdp")
        if how != "alone" or rank == 0:
            rows = run(workload, ranks, how, device, arguments)
            if rank == 0:
                speeds[how] = show(how if how == "alone" else f"{size} ranks, {how}", rows)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        dist.barrier()
    if "alone" in speeds:
        for how, speed in speeds.items():
            print(f"{how:12} {speed:10,.0f} tokens/s, {speed / speeds['alone'] / size:.3f} of {size} times one card")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
