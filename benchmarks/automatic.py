"""The micro-batch that ``auto`` chooses beside every fixed number of samples that fits, under a memory limit.

    PYTORCH_ALLOC_CONF=expandable_segments:True python benchmarks/automatic.py [--memory 24] [--rounds 5] [--updates 50]

Workload W (benchmarks/workload.py) on one CUDA device, this process limited to so many GiB by
`set_per_process_memory_fraction`. One model and optimizer for all. In every round each takes an update of its own
share of the batch, in turn, so that whatever else the machine does meets them alike: the first 64 sequences for fixed
numbers of samples in the order of the batch, all 256 for ``auto``. The table has medians over the rounds. What runs
out of memory, even once, does not fit. Both with a loss that makes all logits and with one that makes them in chunks.
Then ``auto`` with chunks runs its updates, each on a batch of its own with the same distribution of lengths.
"""

import argparse
import logging
import statistics
import time
import warnings
from typing import Any

import torch

import bigbatch
import workload
from bigbatch.lm.attention import use_causal_attention

SIZES = (1, 2, 3, 4, 5, 6)
LOSSES = {"chunks": workload.chunked_loss_fn, "all logits": workload.loss_fn}
SHARE = 64  # sequences of the batch that a fixed number of samples takes in a round


class Contestant:
    """One way of cutting the batch."""

    def __init__(self, name: str, engine: bigbatch.Engine, batch: list[Any]) -> None:
        self.name = name
        self.engine = engine
        self.batch = batch
        self.speeds: list[float] = []
        self.peak_bytes = self.retries = self.num_microbatches = 0

    def take_turn(self) -> None:
        """Make one update; nothing any more for one that does not fit."""
        if self.retries:
            return
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        started_s = time.perf_counter()
        report = self.engine.step(self.batch)
        torch.cuda.synchronize()
        self.speeds.append(sum(map(len, self.batch)) / (time.perf_counter() - started_s))
        self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())
        self.retries += report.retries
        self.num_microbatches = report.num_microbatches

    @property
    def speed(self) -> float:
        """Median tokens a second."""
        return statistics.median(self.speeds)

    def __str__(self) -> str:
        fits = "does not fit" if self.retries else f"{min(self.speeds):,.0f} to {max(self.speeds):,.0f}"
        return (
            f"{self.name:<24}{self.speed:>10,.0f}  {fits:<20}{self.peak_bytes / 2**30:>8.2f}{self.num_microbatches:>8}"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=float, default=24.0, help="GiB that this process may use")
    parser.add_argument("--rounds", type=int, default=5, help="updates that each takes, in turn")
    parser.add_argument("--updates", type=int, default=50, help="of auto on other batches, afterwards")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    import transformers

    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(options.memory * 2**30 / total_bytes)
    batch = workload.make_batch()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{len(batch)} sequences, {sum(map(len, batch)):,} tokens an update; limit {options.memory:g} GiB")
    model = workload.make_model()
    use_causal_attention(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def engine(loss: str, microbatch: Any) -> bigbatch.Engine:
        return bigbatch.Engine(
            model,
            optimizer,
            LOSSES[loss],
            microbatch=microbatch,
            memory=f"{options.memory}GiB" if microbatch == "auto" else None,
            collate=workload.collate,
            lengths=workload.lengths,
            max_grad_norm=1.0,
        )

    contestants = []
    for loss in LOSSES:
        automatic = Contestant(f"auto, {loss}", engine(loss, "auto"), batch)
        started_s = time.perf_counter()
        choice = automatic.engine.tune(batch)
        print(f"{automatic.name}, chosen in {time.perf_counter() - started_s:.1f} s: {choice}")
        print("  tried", ", ".join(f"{tried.size:,}: {tried.per_s:,.0f}/s" for tried in choice.tried))
        print("  predicted" if choice.unpredicted is None else f"  not predicted: {choice.unpredicted}")
        contestants.append(automatic)
        contestants += [Contestant(f"{n} samples, {loss}", engine(loss, n), batch[:SHARE]) for n in SIZES]
    for contestant in contestants:
        contestant.engine.step(contestant.batch[:SHARE][:8])  # warms up
    for _ in range(options.rounds):
        for contestant in contestants:
            contestant.take_turn()
    print(f"{'micro-batch':<24}{'tokens/s':>10}  {'from … to':<20}{'GiB':>8}{'micro-batches':>16}")
    for contestant in contestants:
        print(contestant)
    fixed = [contestant for contestant in contestants if "auto" not in contestant.name and not contestant.retries]
    best = max(fixed, key=lambda contestant: contestant.speed)
    for automatic in contestants:
        if "auto" in automatic.name:
            print(f"{automatic.name} is {automatic.speed / best.speed:.2f} times the best that fits, {best.name}")
    automatic = contestants[0]
    reports = [automatic.engine.step(workload.make_batch(seed=seed)) for seed in range(1, options.updates + 1)]
    retries = [report.retries for report in reports]
    speed = sum(report.tokens for report in reports) / sum(report.elapsed_s for report in reports)
    print(f"{options.updates} updates of {automatic.name} on other batches: {speed:,.0f} tokens/s,", end=" ")
    print(f"{sum(retries)} out of memory, {sum(retries[1:])} after the first window;", end=" ")
    print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB,", end=" ")
    print(f"{automatic.engine.choice.peak_bytes / 2**30:.2f} expected")


if __name__ == "__main__":
    main()
