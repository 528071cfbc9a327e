"""``auto``, as `bigbatch train` runs it, compared with every fixed number of samples that fits, under a memory limit.

    python benchmarks/automatic.py [--memory 24] [--rounds 3] [--updates 50]

Workload W (benchmarks/workload.py) on one CUDA device, with the process limited to that many GiB by
`set_per_process_memory_fraction`. All contestants share one model and optimizer. Fixed numbers of samples are padded
rows in the order of the batch, in eager mode, with a loss that computes all logits and with one that computes them in
chunks; each runs the first 16 sequences of the batch. ``auto`` runs all 256, packed, compiled and captured as CUDA
graphs where the model supports it. In every round each contestant runs one update, in alternation, so that other load
on the machine affects all of them equally; the table has medians. A contestant that runs out of memory, even once, does
not fit. Then ``auto`` runs its updates, each on another batch with the same distribution of lengths; finally, without
the memory limit, it alternates with a hand-written loop that replays the same CUDA graphs of the same micro-batches.
"""

import argparse
import logging
import math
import statistics
import time
import warnings
from typing import Any

import torch

import bigbatch
import workload
from bigbatch.execution.cuda_graphs import capture
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.setup import ModelSetup, set_up_model
from bigbatch.lm.training.autotune import describe, tune

SIZES = {"all logits": (1, 2), "chunks": (1, 2, 4, 6)}
LOSSES = {"chunks": workload.chunked_loss_fn, "all logits": workload.loss_fn}
SHARE = 16  # sequences of the batch that a fixed number of samples runs in a round


class Contestant:
    """One way of cutting the batch."""

    def __init__(self, name: str, engine: bigbatch.Engine, batch: list[Any]) -> None:
        self.name = name
        self.engine = engine
        self.batch = batch
        self.speeds: list[float] = []
        self.tokens = sum(len(sample["input_ids"] if isinstance(sample, dict) else sample) for sample in batch)
        self.peak_bytes = self.retries = self.num_microbatches = 0

    def take_turn(self, *, warm_updates: int) -> None:
        """Run warm-up updates and time one; skip a contestant that does not fit."""
        if self.retries:
            return
        torch.cuda.reset_peak_memory_stats()
        for _ in range(warm_updates):
            self.engine.step(self.batch)
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        report = self.engine.step(self.batch)
        torch.cuda.synchronize()
        self.speeds.append(self.tokens / (time.perf_counter() - started_s))
        self.engine.release_cuda_graphs()
        self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())
        self.retries += report.retries
        self.num_microbatches = report.num_microbatches

    @property
    def speed(self) -> float:
        """Median tokens per second."""
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
    parser.add_argument("--rounds", type=int, default=3, help="timed updates of each contestant, in alternation")
    parser.add_argument("--updates", type=int, default=50, help="updates of auto on other batches, afterwards")
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    started_s = time.perf_counter()
    config = TrainConfig(model="w", max_length=workload.LONGEST).resolved()
    run = set_up_model(model, config, DeviceSpec(torch.device("cuda", 0), "bf16"), pad_id=0, longest=workload.LONGEST)
    samples = [{"input_ids": ids, "labels": ids} for ids in batch]
    engine = bigbatch.Engine(
        model,
        optimizer,
        run.loss_fn,
        microbatch="auto",
        memory=f"{options.memory}GiB",
        collate=run.collate,
        lengths=lambda samples: [len(sample["input_ids"]) for sample in samples],
        layout=run.layout,
        cuda_graphs=run.uses_cuda_graphs,
        max_grad_norm=1.0,
    )
    level, choice = tune(engine, run.layers, samples, modes=True)
    print(f"auto, from a cold start in {time.perf_counter() - started_s:.1f} s: {choice}{describe(level)}", flush=True)
    contestants = [Contestant("auto", engine, samples)]
    for loss, sizes in SIZES.items():
        for size in sizes:
            fixed = bigbatch.Engine(
                model, optimizer, LOSSES[loss], microbatch=size, collate=workload.collate, max_grad_norm=1.0
            )
            contestants.append(Contestant(f"{size} samples, {loss}", fixed, batch[:SHARE]))
    for number in range(options.rounds):
        contestants[0].take_turn(warm_updates=1 if number else 2)  # one eager, one that captures
        with run.layers.eager():
            for contestant in contestants[1:]:
                contestant.take_turn(warm_updates=0 if number else 1)
    print(f"{'micro-batch':<24}{'tokens/s':>10}  {'from … to':<20}{'GiB':>8}{'micro-batches':>16}")
    for contestant in contestants:
        print(contestant)
    fitting = [contestant for contestant in contestants[1:] if not contestant.retries]
    best = max(fitting, key=lambda contestant: contestant.speed)
    print(f"auto is {contestants[0].speed / best.speed:.2f} times the best that fits, {best.name}", flush=True)
    batches = (workload.make_batch(seed=seed) for seed in range(1, options.updates + 1))
    reports = [engine.step([{"input_ids": ids, "labels": ids} for ids in batch]) for batch in batches]
    retries = [report.retries for report in reports]
    speed = sum(report.tokens for report in reports) / sum(report.elapsed_s for report in reports)
    print(f"{options.updates} updates of auto on other batches: {speed:,.0f} tokens/s,", end=" ")
    print(f"{sum(retries)} out of memory, {sum(retries[1:])} after the first window;", end=" ")
    print(f"reserved at most {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB of {options.memory:g}", flush=True)
    torch.cuda.set_per_process_memory_fraction(1.0)
    ratio = relative_to_loop(engine, run, optimizer, samples)
    print(f"auto takes {ratio:.3f} of the time of a hand-written loop over the same CUDA graphs")


def relative_to_loop(engine: bigbatch.Engine, run: ModelSetup, optimizer: torch.optim.Optimizer, samples: Any) -> float:
    """Return the time of the engine relative to a hand-written loop with the same plan and kernels."""
    parameters = list(run.model.parameters())
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    groups = engine.groups([len(sample["input_ids"]) for sample in samples])
    recordings: dict[Any, tuple[Any, dict[str, torch.Tensor], torch.Tensor]] = {}

    def by_hand() -> None:
        torch._foreach_zero_(sums)
        losses, items = [], 0
        for rows in groups:
            microbatch = run.collate([samples[i] for i in rows])
            items += int((microbatch["labels"] != workload.IGNORED).sum())
            key = tuple(tensor.shape for tensor in microbatch.values())
            if key not in recordings:
                recordings[key] = recorded({name: tensor.cuda() for name, tensor in microbatch.items()})
            graph, inputs, loss_sum = recordings[key]
            for name, tensor in microbatch.items():
                inputs[name].copy_(tensor.pin_memory(), non_blocking=True)
            graph.replay()
            losses.append(loss_sum.clone())
        torch._foreach_div_(sums, items)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if math.isfinite(norm.item()):
            optimizer.step()
        (torch.stack(losses).sum() / items).item()

    def recorded(inputs: dict[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
        found: list[torch.Tensor] = []

        def differentiate() -> None:
            found.append(run.loss_fn(run.model, inputs)[0])
            found[-1].backward()

        return capture(differentiate), inputs, found[0].detach()

    seconds: dict[str, list[float]] = {"engine": [], "by hand": []}
    for number in range(9):
        for name in seconds:
            for parameter, total in zip(parameters, sums, strict=True):
                parameter.grad = total if name == "by hand" else None
            torch.cuda.synchronize()
            started_s = time.perf_counter()
            if name == "engine":
                _ = engine.step(samples).loss
            else:
                by_hand()
            torch.cuda.synchronize()
            if number >= 2:
                seconds[name].append(time.perf_counter() - started_s)
    return statistics.median(seconds["engine"]) / statistics.median(seconds["by hand"])


if __name__ == "__main__":
    main()
