"""The micro-batch that ``auto`` chooses beside every fixed number of samples that fits, under a memory limit.

    python benchmarks/automatic.py [--memory 24] [--updates 50]

Workload W (benchmarks/workload.py) on one CUDA device, this process limited to so many GiB by
`set_per_process_memory_fraction`. Fixed numbers of samples go in the order of the batch, as users run them; "sorted"
ones are cut from the batch sorted by length. Afterwards ``auto`` runs its updates, each on a batch of its own with the
same distribution of lengths; every out-of-memory error is counted.
"""

import argparse
import gc
import logging
import time
import warnings
from typing import Any

import torch

import bigbatch
import workload
from bigbatch.lm.attention import use_causal_attention

SIZES = (1, 2, 3, 4, 6, 8)


def make_engine(microbatch: Any, memory: str | None = None) -> bigbatch.Engine:
    """Make model, optimizer and engine anew."""
    gc.collect()
    torch.cuda.empty_cache()
    model = workload.make_model()
    use_causal_attention(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return bigbatch.Engine(
        model,
        optimizer,
        workload.loss_fn,
        microbatch=microbatch,
        memory=memory,
        collate=workload.collate,
        lengths=workload.lengths,
        max_grad_norm=1.0,
    )


def measure(engine: bigbatch.Engine, batch: list[Any], updates: int) -> tuple[float, list[bigbatch.WindowReport]]:
    """Give tokens a second of the fastest of some updates, and all their reports."""
    reports = []
    best_s = float("inf")
    for _ in range(updates):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        reports.append(engine.step(batch))
        torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - started_s)
    return reports[-1].tokens / best_s, reports


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=float, default=24.0, help="GiB that this process may use")
    parser.add_argument("--updates", type=int, default=50, help="of the automatic micro-batch")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    import transformers

    torch.cuda.set_per_process_memory_fraction(
        options.memory * 2**30 / torch.cuda.get_device_properties(0).total_memory
    )
    batch = workload.make_batch()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{len(batch)} sequences, {sum(map(len, batch)):,} tokens an update; limit {options.memory:g} GiB")
    print(f"{'micro-batch':<26}{'tokens/s':>10}{'peak GiB':>10}{'micro-batches':>15}{'out of memory':>15}")
    best = 0.0
    for order in ("", ", sorted"):
        for size in SIZES:
            engine = make_engine(size)
            torch.cuda.reset_peak_memory_stats()
            samples = sorted(batch, key=len, reverse=True) if order else batch
            speed, reports = measure(engine, samples, 2)
            tries = sum(report.retries for report in reports)
            if not order and not tries:
                best = max(best, speed)
            show(f"{size} samples{order}", speed, reports[-1], tries)
            del engine
            if tries:
                break
    started_s = time.perf_counter()
    engine = make_engine("auto", f"{options.memory}GiB")
    choice = engine.tune(batch)
    print(f"auto, in {time.perf_counter() - started_s:.1f} s: {choice}")
    print(f"  tried {choice.tried}; {choice.timing}")
    torch.cuda.reset_peak_memory_stats()
    speed, reports = measure(engine, batch, 3)
    show("auto", speed, reports[-1], sum(report.retries for report in reports))
    tries = [engine.step(workload.make_batch(seed=seed)).retries for seed in range(1, options.updates + 1)]
    print(f"{options.updates} updates on other batches: {sum(tries)} out of memory, {sum(tries[1:])} after the first;")
    print(f"  peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB, reserved", end=" ")
    print(f"{torch.cuda.max_memory_reserved() / 2**30:.2f} GiB, predicted {choice.peak_bytes / 2**30:.2f} GiB")
    print(f"auto is {speed / best:.2f} times the best fixed number of samples that fits, in the order of the batch")


def show(name: str, speed: float, report: bigbatch.WindowReport, tries: int) -> None:
    """Print a line of the table."""
    peak_gib = (report.peak_bytes or 0) / 2**30
    print(f"{name:<26}{speed:>10,.0f}{peak_gib:>10.2f}{report.num_microbatches:>15}{tries:>15}", flush=True)


if __name__ == "__main__":
    main()
