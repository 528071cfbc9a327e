"""Overhead of measuring the gradient noise scale, interleaved in one run.

    python benchmarks/noise_cost.py [--workload w-small] [--rounds 6] [--turns 3]

The workloads are those of `bigbatch bench`, set up and cut as `bigbatch train` does. Both engines run the same model
and micro-batches in alternation, the order alternates, and the ratio is that of the means: without CUDA graphs, one
window in eight is measured. Running without it twice gives the noise floor: its difference from 1.000 is the machine's.
On a CPU, times are process times on one thread, which exclude other processes.
"""

import argparse
import logging
import statistics
import time
import warnings
from typing import Any

import torch

import bigbatch
from bigbatch.lm.bench.bigbatch_runner import set_up
from bigbatch.lm.bench.workload import WORKLOADS, count_tokens, shift
from bigbatch.lm.training.autotune import tune
from bigbatch.memory.usage import free_cached_memory
from bigbatch.scaling.noise_scale import MEASURE_FIRST

NAMES = {"without": False, "with": True, "without, again": False}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="w-small", choices=[*WORKLOADS])
    parser.add_argument("--rounds", type=int, default=8, help="timed updates per turn")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    workload = WORKLOADS[options.workload]
    machine = workload.device_spec()
    if machine.device.type == "cuda" and workload.memory is not None:
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(float(workload.memory.removesuffix("GiB")) * 2**30 / total_bytes, 0)
    if machine.device.type == "cpu":
        torch.set_num_threads(1)
    samples = shift(workload.make_samples())
    run = set_up(workload.make_trained_model(machine.device), workload)
    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)

    def engine(**settings: Any) -> bigbatch.Engine:
        return bigbatch.Engine(
            run.model,
            optimizer,
            run.loss_fn,
            collate=run.collate,
            lengths=lambda batch: [len(sample["input_ids"]) for sample in batch],
            layout=run.layout,
            cuda_graphs=run.uses_cuda_graphs,
            **settings,
        )

    memory = workload.memory if machine.device.type == "cuda" else None
    automatic = engine(microbatch="auto", memory=memory)
    _, choice = tune(automatic, run.layers, samples, modes=True)
    automatic.release_cuda_graphs()
    size = max(choice.size, workload.longest)
    engines = {name: engine(microbatch=bigbatch.TokenBudget(size), noise=noise) for name, noise in NAMES.items()}
    measuring = engines["with"].accumulator.noise
    assert measuring is not None
    for _ in range(MEASURE_FIRST):  # these windows are all measured
        measuring.skip_window(0.0)
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for turn in range(options.turns):
        for name in [*NAMES] if turn % 2 == 0 else [*reversed(NAMES)]:
            times[name] += take_turn(engines[name], samples, options.rounds, machine.device)
    print(
        f"{machine}, torch {torch.__version__}; {workload.name}: {count_tokens(samples):,} tokens an update, {choice}"
    )
    known = engines["with"].accumulator.noise
    print(f"noise scale of these random tokens at the first weights: {known and known.estimate()}")
    floor = statistics.mean(times["without"])
    for name, seconds in times.items():
        mean = statistics.mean(seconds)
        print(f"{name:<16}{1e3 * mean:>10.1f} ms{mean / floor:>8.3f}   ({len(seconds)} updates)")


def take_turn(engine: bigbatch.Engine, samples: Any, rounds: int, device: torch.device) -> list[float]:
    """Warm up with two updates, one of which captures, and time some updates."""
    seconds = []
    for number in range(2 + rounds):
        wait(device)
        started_s = now(device)
        engine.step(samples)
        wait(device)
        if number >= 2:
            seconds.append(now(device) - started_s)
    engine.release_cuda_graphs()
    free_cached_memory()
    return seconds


def now(device: torch.device) -> float:
    """Return the time of the clock in use."""
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def wait(device: torch.device) -> None:
    """Synchronize with the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
