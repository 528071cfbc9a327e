"""The micro-batch that ``auto`` chooses, compared with fixed numbers of samples, on two CPU cores and real data.

    python benchmarks/automatic_cpu.py [--rounds 5]

The tiny model of `bigbatch train` on `python-stdlib-functions` (docstring as prompt, body as completion), sequences of
up to 1,024 tokens, 64 of them per update. Fixed numbers of samples are cut from the batch in its own order, as users
run them, and from the batch sorted by length. All contestants run the same updates in alternation, so that other load
on the machine affects all of them equally; the table has medians. The peak covers all tensors, counted by
`bigbatch.memory.allocation_tracker.AllocationTracker` in a separate update.
"""

import argparse
import logging
import statistics
import time
import warnings
from typing import Any

import torch

import bigbatch
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.sampling_order import epoch_windows
from bigbatch.lm.training.optimizer import make_optimizer
from bigbatch.lm.training.setup import TrainingSetup, set_up_training
from bigbatch.memory.allocation_tracker import AllocationTracker, MemoryCategory

SIZES = (1, 2, 4, 8, 16)
GLOBAL_BATCH = 64


def make_engine(prepared: TrainingSetup, microbatch: Any) -> bigbatch.Engine:
    """Make an engine; all engines train the same model."""
    return bigbatch.Engine(
        prepared.model,
        make_optimizer(prepared.model, prepared.config, prepared.device_spec),
        prepared.loss_fn,
        microbatch=microbatch,
        collate=prepared.collate,
        lengths=lambda samples: [len(sample["input_ids"]) for sample in samples],
        max_grad_norm=1.0,
    )


def peak_of(prepared: TrainingSetup, engine: bigbatch.Engine, samples: list[Any]) -> int:
    """Return the peak bytes of all tensors in one update."""
    optimizer = engine.accumulator.optimizer
    with AllocationTracker(torch.device("cpu")) as tracker:
        tracker.track([*prepared.model.parameters(), *prepared.model.buffers()], MemoryCategory.PARAMETERS)
        tracker.track(
            [value for state in optimizer.state.values() for value in state.values()], MemoryCategory.OPTIMIZER
        )
        engine.step(samples)
    return tracker.peak_bytes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed updates of each contestant, in alternation")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    prepared = set_up_training(
        TrainConfig(data="python-stdlib-functions", max_length=1024, device="cpu", global_batch=GLOBAL_BATCH)
    )
    training = prepared.training
    windows = epoch_windows(training.lengths, global_batch=GLOBAL_BATCH, global_batch_tokens=None, seed=0, epoch=0)
    batches = [[training[i] for i in window] for window in windows[: options.rounds]]
    print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}; {options.rounds} rounds in turn")
    tokens = [sum(len(sample["input_ids"]) for sample in batch) for batch in batches]
    print(f"{GLOBAL_BATCH} sequences an update, {sum(tokens) / len(tokens):,.0f} tokens on average, at most 1,024 each")
    auto = make_engine(prepared, "auto")
    started_s = time.perf_counter()
    longest = max(range(len(training)), key=training.lengths.__getitem__)
    choice = auto.tune([*batches[0], training[longest]])
    print(f"auto, in {time.perf_counter() - started_s:.1f} s: {choice}")
    engines = {"auto": (auto, False)}
    engines |= {f"{size} samples": (make_engine(prepared, size), False) for size in SIZES}
    engines |= {f"{size} samples, sorted": (make_engine(prepared, size), True) for size in SIZES}
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    laid_out: dict[str, float] = {}
    for batch, num_tokens in zip(batches, tokens, strict=True):
        for name, (engine, in_order_of_length) in engines.items():
            samples = sorted(batch, key=lambda sample: -len(sample["input_ids"])) if in_order_of_length else batch
            groups = engine.groups([len(sample["input_ids"]) for sample in samples])
            padded = sum(len(rows) * max(len(samples[i]["input_ids"]) for i in rows) for rows in groups)
            laid_out[name] = padded / num_tokens
            started_s = time.perf_counter()
            engine.step(samples)
            speeds[name].append(num_tokens / (time.perf_counter() - started_s))
    print(f"{'micro-batch':<22}{'tokens/s':>10}{'of auto':>10}{'padded a real one':>19}{'peak MiB':>10}")
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    fullest = max(batches, key=lambda batch: sum(len(sample["input_ids"]) for sample in batch))
    peaks = {}
    for name, (engine, in_order_of_length) in engines.items():
        samples = sorted(fullest, key=lambda sample: -len(sample["input_ids"])) if in_order_of_length else fullest
        peaks[name] = peak_of(prepared, engine, samples)
        print(
            f"{name:<22}{medians[name]:>10,.0f}{medians[name] / medians['auto']:>10.2f}{laid_out[name]:>19.2f}"
            f"{peaks[name] / 2**20:>10,.0f}"
        )
    best = max(medians[f"{size} samples"] for size in SIZES)
    best_sorted = max(medians[f"{size} samples, sorted"] for size in SIZES)
    peak = peaks["auto"] / peaks["8 samples"]
    print(f"auto is {medians['auto'] / best:.2f} times the best fixed number of samples ({best:,.0f} tokens/s),")
    print(f"  {medians['auto'] / medians['8 samples']:.2f} times 8 samples, at {peak:.2f} of its peak,")
    print(f"  and {medians['auto'] / best_sorted:.2f} times the best fixed number of sorted samples")


if __name__ == "__main__":
    main()
