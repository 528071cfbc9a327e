"""Time and peak memory of a Trainer with and without `exact`; `frameworks.py` runs this for its modes.

Overhead: samples of one length, where both Trainers compute the same update with the same micro-batches. They take
turns update by update in one process: stock, exact, a second stock Trainer. The overhead is the median over these
rounds of the time of ``exact`` over the mean of its two neighbours; the second stock Trainer over the first one shows
the noise. ``exact`` checks the unit of the loss in windows 1 to 4, 8, 16...: the first four are not timed, and the
ratio of the sums of all later ones contains the others.

Token budget: ragged lengths, the same window for all, in turns; the Trainer with its own batch size, and sorted by
length (``group_by_length``, which changes the samples of an update), beside ``exact`` with a `TokenBudget`. Tokens are
real ones, without padding. The peak is of one update, in a run of its own.

Capped: ``--memory`` is all that the allocator may have. Lengths are log-normal with long samples. The Trainer with
``per_device_train_batch_size=32`` runs out of memory, and ``exact(trainer, memory=...)`` with the same arguments does
not; beside it the Trainer with smaller batch sizes and more accumulation steps, for the same window, up to the first
one that runs out of memory. A Trainer stops after a minute and one timed update. On a CPU there is no cap: it is a dry
run.

Seconds are those of the clock on CUDA, and of the process on a CPU, which other processes disturb less.
"""

import argparse
import contextlib
import gc
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

from bigbatch import TokenBudget
from bigbatch.integrations.transformers import exact
from bigbatch.memory.allocation_tracker import AllocationTracker
from bigbatch.memory.limit import parse_memory

IGNORED, WARMUP = -100, 4
LIMIT_S = 60  # of one contender of the capped comparison
Sample = dict[str, list[int]]


@dataclass(frozen=True)
class Workload:
    """Model, data and window.

    Args:
        layers: Of the model.
        width: Of the model.
        vocabulary: Of the model.
        lengths: Shortest, median and longest sample, in tokens.
        batch_size: ``per_device_train_batch_size``.
        steps: ``gradient_accumulation_steps``.
    """

    layers: int
    width: int
    vocabulary: int
    lengths: tuple[int, int, int]
    batch_size: int
    steps: int

    @property
    def window(self) -> int:
        """Samples of an update."""
        return self.batch_size * self.steps

    def model(self, device: str) -> Any:
        """Make a Llama with random weights."""
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=4 * self.width,
            num_hidden_layers=self.layers, num_attention_heads=max(1, self.width // 64),
            max_position_embeddings=self.lengths[2], pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
        )  # fmt: skip
        with torch.device(device):
            return transformers.LlamaForCausalLM(config)

    def samples(self, updates: int, *, ragged: bool) -> list[Sample]:
        """Make the samples of some updates; every window of ragged ones has one of the greatest length."""
        numbers, (shortest, median, longest) = random.Random(0), self.lengths
        found = []
        for index in range(updates * self.window):
            length = min(max(round(median * numbers.lognormvariate(0.0, 1.0)), shortest), longest)
            length = (longest if index % self.window == self.window // 2 else length) if ragged else median
            ids = [numbers.randrange(3, self.vocabulary) for _ in range(length)]
            found.append({"input_ids": ids, "labels": ids})
        return found


SMALL = Workload(layers=2, width=64, vocabulary=256, lengths=(16, 48, 384), batch_size=8, steps=4)
MEDIUM = Workload(layers=2, width=256, vocabulary=1024, lengths=(16, 64, 384), batch_size=8, steps=4)
LARGE = Workload(layers=12, width=768, vocabulary=32000, lengths=(32, 200, 1024), batch_size=16, steps=4)
WIDE = Workload(layers=8, width=2048, vocabulary=32000, lengths=(32, 1024, 1024), batch_size=8, steps=4)
CAPPED = replace(LARGE, lengths=(32, 200, 4096), batch_size=32)


class Collator:
    """Pads to the longest sample; counts the real tokens of every call."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Return a batch."""
        self.tokens.append(sum(lengths(samples)))
        return collate(samples)


def collate(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Pad to the longest sample."""
    longest = max(len(sample["input_ids"]) for sample in samples)

    def pad(key: str, value: int) -> torch.Tensor:
        return torch.tensor([sample[key] + [value] * (longest - len(sample[key])) for sample in samples])

    ids = pad("input_ids", 0)
    return {"input_ids": ids, "labels": pad("labels", IGNORED), "attention_mask": (ids != 0).long()}


def lengths(samples: Sequence[Sample]) -> list[int]:
    """Return the tokens of each sample."""
    return [len(sample["input_ids"]) for sample in samples]


class Times(transformers.TrainerCallback):
    """Measures the seconds of every update, with reading and collating its samples.

    Args:
        device: Is synchronized at both ends.
        turn: Waits until this trainer may run an update, if several take turns.
        end: Lets the next one run.
        limit_s: After this time training stops, if an update after the first ones was timed.
        warmup: Number of the first ones.
    """

    def __init__(
        self,
        device: str,
        turn: Callable[[], object] = lambda: None,
        end: Callable[[], object] = lambda: None,
        *,
        limit_s: float = float("inf"),
        warmup: int = 0,
    ) -> None:
        self.device, self.turn, self.end = device, turn, end
        self.limit_s, self.warmup = limit_s, warmup
        self.seconds: list[float] = []
        self._start = 0.0

    def _synchronize(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the first turn, and start the clock."""
        self.turn()
        self._start = self._synchronize()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock, and start it for the next update, which begins with its data."""
        self.seconds.append(self._synchronize() - self._start)
        if sum(self.seconds) > self.limit_s and len(self.seconds) > self.warmup:
            control.should_training_stop = True
        self.end()
        self.turn()
        self._start = self._synchronize()


def make_trainer(work: Workload, samples: list[Sample], device: str, times: Times, **settings: Any) -> Any:
    """Make a stock Trainer."""
    values: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": work.batch_size, "learning_rate": 1e-5,
        "gradient_accumulation_steps": work.steps, "num_train_epochs": 1, "use_cpu": device == "cpu",
        "bf16": device == "cuda", "report_to": [], "save_strategy": "no", "logging_strategy": "no",
        "disable_tqdm": True, "remove_unused_columns": False, "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": device == "cuda",
    }  # fmt: skip
    args = transformers.TrainingArguments(**(values | settings))
    trainer = transformers.Trainer(
        work.model(device), args, data_collator=Collator(), train_dataset=samples, callbacks=[times]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def tokens_of_updates(trainer: Any, samples: list[Sample], window: int) -> list[int]:
    """Return the real tokens of each update: of the order that a stock Trainer chose, or of that of the samples."""
    steps, counts = trainer.args.gradient_accumulation_steps, trainer.data_collator.tokens
    if trainer.args.train_sampling_strategy == "sequential":
        steps, counts = window, lengths(samples)
    return [sum(counts[start : start + steps]) for start in range(0, len(counts), steps)]


def clear(device: str) -> None:
    """Free what earlier runs left, and reset the peak."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


Contenders = dict[str, tuple[dict[str, Any], dict[str, Any]]]
"""Name → training arguments, and the arguments of `exact`, or none for the stock Trainer."""


def in_turns(
    work: Workload, samples: list[Sample], device: str, contenders: Contenders
) -> dict[str, tuple[list[float], list[int]]]:
    """Train all contenders, each update in turn, and return the seconds and the tokens of their updates."""
    names = list(contenders)
    gates = {name: threading.Semaphore(0) for name in names}
    following = dict(zip(names, [*names[1:], names[0]], strict=True))
    errors: list[BaseException] = []
    times = {name: Times(device, gates[name].acquire, gates[following[name]].release) for name in names}
    trainers = {}
    for name, (settings, how) in contenders.items():
        trainers[name] = make_trainer(work, samples, device, times[name], **settings)
        if how:
            exact(trainers[name], **how)

    def train(name: str) -> None:
        try:
            trainers[name].train()
        except BaseException as error:  # noqa: BLE001  raised below, in the main thread
            errors.append(error)
        for _ in samples:  # the next one need not wait for this one again
            gates[following[name]].release()

    threads = [threading.Thread(target=train, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    gates[names[0]].release()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    tokens = {name: tokens_of_updates(trainers[name], samples, work.window) for name in names}
    return {name: (times[name].seconds, tokens[name]) for name in names}


def overhead(work: Workload, device: str, updates: int) -> None:
    """Print how the time of an update with `exact` compares with that of the stock Trainers before and after it."""
    samples = work.samples(updates + WARMUP, ragged=False)
    contenders: Contenders = {"stock": ({}, {}), "exact": ({}, {"items": "auto"}), "stock again": ({}, {})}
    found = in_turns(work, samples, device, contenders)
    before, ours, after = (seconds[WARMUP:] for seconds, _ in found.values())
    clear(device)
    medians = [1e3 * statistics.median(seconds) for seconds in (before, ours, after)]
    ratios = [own / ((first + second) / 2) for first, own, second in zip(before, ours, after, strict=True)]
    noise = [second / first for first, second in zip(before, after, strict=True)]
    total = sum(ours) / ((sum(before) + sum(after)) / 2)
    print(f"overhead on {device}: {updates} updates of {work.window} samples of {work.lengths[1]} tokens, in turns")
    print(f"  {'':<12}{'ms/update':>12}{'median ratio':>15}{'quartiles':>16}")
    print(f"  {'stock':<12}{medians[0]:>12.2f}")
    print(f"  {'exact':<12}{medians[1]:>12.2f}{statistics.median(ratios):>15.3f}{quartiles(ratios):>16}")
    print(f"  {'stock again':<12}{medians[2]:>12.2f}{statistics.median(noise):>15.3f}{quartiles(noise):>16}")
    print(f"  sum of all timed updates, exact over stock: {total:.3f} (contains windows that are checked)", flush=True)


def quartiles(values: Sequence[float]) -> str:
    """Return the first and the third quartile of at least two values."""
    first, _, third = statistics.quantiles(values, n=4)
    return f"{first:.3f}–{third:.3f}"


@dataclass(frozen=True)
class Run:
    """Result of one training run: real tokens per second and peak bytes; or the updates until it ran out of memory."""

    tokens_per_s: float = 0.0
    peak_bytes: int = 0
    died_after: int | None = None


def run(
    work: Workload,
    samples: list[Sample],
    device: str,
    settings: dict[str, Any],
    *,
    warmup: int = WARMUP,
    limit_s: float = float("inf"),
    **how: Any,
) -> Run:
    """Train on samples, stock or with the arguments of `exact`; the first updates are not timed."""
    clear(device)
    times = Times(device, limit_s=limit_s, warmup=warmup)
    trainer = make_trainer(work, samples, device, times, **settings)
    if how:
        exact(trainer, **how)
    tracker = AllocationTracker(torch.device("cpu")) if device == "cpu" and len(samples) == work.window else None
    try:
        with tracker or contextlib.nullcontext():
            trainer.train()
        tokens = tokens_of_updates(trainer, samples, work.window)
    except torch.OutOfMemoryError:
        return Run(died_after=len(times.seconds))
    finally:
        del trainer
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else tracker.peak_bytes if tracker else 0
    seconds = times.seconds[warmup:]
    return Run(sum(tokens[warmup : len(times.seconds)]) / sum(seconds) if seconds else 0.0, peak)


def print_line(name: str, tokens_per_s: float, peak: int, reference: float) -> None:
    """Print one contender, and its throughput relative to a reference, if there is one."""
    ratio = f"   {tokens_per_s / reference:.2f} of the best stock setting" if reference else ""
    mebibytes = f"{peak / 2**20:,.0f}" if peak else "–"
    print(f"  {name:<44}{tokens_per_s:>12,.0f}{mebibytes:>11}{ratio}", flush=True)


def budgets(work: Workload, device: str, updates: int) -> None:
    """Compare the Trainer's own settings with a token budget."""
    print(f"ragged on {device}: {updates} updates of {work.window} samples of {work.lengths} tokens (min, median, max)")
    print(f"  {'':<44}{'tokens/s':>12}{'peak MiB':>11}")
    budget = work.lengths[2] * 2
    contenders: Contenders = {
        f"stock, batch size {work.batch_size}": ({}, {}),
        f"stock, batch size {work.batch_size}, group_by_length": ({"train_sampling_strategy": "group_by_length"}, {}),
        f"exact, batch size {work.batch_size}": ({}, {"lengths": lengths}),
        f"exact, TokenBudget({budget})": ({}, {"microbatch": TokenBudget(budget), "lengths": lengths}),
    }
    samples = work.samples(updates + WARMUP, ragged=True)
    found = in_turns(work, samples, device, contenders)
    clear(device)
    speeds = {name: sum(tokens[WARMUP:]) / sum(seconds[WARMUP:]) for name, (seconds, tokens) in found.items()}
    best = max(speeds[name] for name, (_, how) in contenders.items() if not how)
    for name, (settings, how) in contenders.items():
        peak = run(work, samples[: work.window], device, settings, **how).peak_bytes
        print_line(name, speeds[name], peak, best if how else 0.0)


def capped(
    work: Workload, device: str, updates: int, memory: str, sizes: Sequence[int], common: dict[str, Any]
) -> None:
    """Compare `exact` with stock batch sizes under a memory cap; all have the common training arguments.

    The first update of a stock Trainer is not timed, nor the first four of ``exact``, which checks its unit in them.
    """
    print(f"capped on {device}, {memory}: {updates} updates of {work.window} samples of {work.lengths} tokens", end="")
    print(" (min, median, max)")
    print(f"  {'':<44}{'tokens/s':>12}{'peak MiB':>11}")
    how = {"memory": memory, "lengths": lengths}
    contenders: Contenders = {f'exact, batch size {work.batch_size}, memory="{memory}"': (common, how)}
    for size in sorted(sizes):
        settings = common | {"per_device_train_batch_size": size, "gradient_accumulation_steps": work.window // size}
        contenders[f"stock, batch size {size}"] = settings, {}
        grouped = settings | {"train_sampling_strategy": "group_by_length"}
        contenders[f"stock, batch size {size}, group_by_length"] = grouped, {}
    speeds: dict[bool, float] = {False: 0.0, True: 0.0}  # the best, by whether it is exact
    too_large: set[str] = set()  # sampling strategies that ran out of memory with a smaller batch size
    with cap(device, memory):
        for name, (settings, how) in contenders.items():
            sampling = name.partition("group")[1]
            if not how and sampling in too_large:
                print(f"  {name:<44}  not run: a smaller one runs out of memory", flush=True)
                continue
            warmup = WARMUP if how else 1
            samples = work.samples(updates + warmup, ragged=True)
            done = run(work, samples, device, settings, warmup=warmup, limit_s=LIMIT_S, **how)
            if done.died_after is not None:
                print(f"  {name:<44}  out of memory after {done.died_after} updates", flush=True)
                too_large.add(sampling)
                continue
            speeds[bool(how)] = max(speeds[bool(how)], done.tokens_per_s)
            print_line(name, done.tokens_per_s, done.peak_bytes, 0.0)
    if all(speeds.values()):
        print(f"  exact has {speeds[True] / speeds[False]:.1f} times the tokens/s of the best stock setting that fits")


@contextlib.contextmanager
def cap(device: str, memory: str) -> Iterator[None]:
    """Limit what the allocator may have."""
    if device != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(parse_memory(memory).to_bytes(total) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def main(words: Sequence[str] | None = None) -> None:
    """Run the overhead and the token budget, or one of both, or the capped comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--capped", action="store_true")
    parser.add_argument("--overhead", action="store_true", help="only the overhead")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", default="12GiB", help="of the card, with --capped")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", help="of stock Trainers, with --capped; by default 1, 2, 4, 8, 16, 32"
    )
    parser.add_argument("--checkpointing", action="store_true", help="gradient_checkpointing for all, with --capped")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--size", choices=("small", "large"), help="by default large on CUDA")
    given = parser.parse_args(words)
    large = given.size == "large" or (given.size is None and given.device == "cuda")
    work = (CAPPED if given.capped else LARGE) if large else SMALL
    where = torch.cuda.get_device_name() if given.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{where}, torch {torch.__version__}, transformers {transformers.__version__}, Python {sys.version.split()[0]}"
    )
    if given.capped:
        common = {"gradient_checkpointing": True} if given.checkpointing else {}
        halves = [work.batch_size >> power for power in range(work.batch_size.bit_length())]
        capped(work, given.device, given.updates, given.memory, given.batch_sizes or halves, common)
        return
    overhead(WIDE if large else MEDIUM, given.device, given.updates)
    if not given.overhead:
        budgets(work, given.device, given.updates)


if __name__ == "__main__":
    main()
