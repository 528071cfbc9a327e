"""Speed and memory of full AdamW training at every level of `offload`, interleaved.

    python benchmarks/offload.py --rounds 3 --out FILE     # one CUDA GPU with 80 GB
    python benchmarks/offload.py --quick       # one round of windows of W, under five minutes
    python benchmarks/offload.py --quick --levels gradients --billions 1.5 --memory 8       # no more than 8 GiB
    python benchmarks/offload.py --quick --levels none --checkpointing offload      # inputs of layers on the host
    python benchmarks/offload.py --dry         # a tiny model on the CPU, to try the script

A Llama of 1.5 billion parameters, or of ``--billions``, from its configuration, with random float32 weights under bf16
autocast and fused AdamW. The model is made in host memory and moved by `bigbatch.move_to_device`: from ``master`` on,
its float32 weights need not fit in ``--memory``. A window has the sequences of workload W (92,493 tokens), or of
several such batches, in packed rows of ``--tokens`` tokens. Each turn makes model and engine anew, runs ``--warm-up``
updates, and then measures ``--updates``. *Device* is the highest memory of torch's allocator in the measured updates,
*host* the pinned memory of offloaded state and of inputs of layers, *step* the time of the update after the last
micro-batch, by CUDA events around ``optimizer.step``; at ``gradients`` without the norm, which is computed before.
*Loss* is that of the last update; attention on CUDA is not deterministic, so that its last digits differ from turn to
turn, while `tests/offload/test_offload_cuda.py` compares the bits. The first lines have the measured rate of the link,
in each direction while both are busy.
"""

import argparse
import gc
import platform
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bigbatch import TokenBudget, move_to_device
from bigbatch.lm.bench.bigbatch_runner import set_up
from bigbatch.lm.bench.workload import W_SMALL, W, shift
from bigbatch.lm.model.parallel_fills import filled_in_parallel
from bigbatch.lm.training.engine_factory import make_engine
from bigbatch.offload.levels import LEVELS
from bigbatch.offload.link_rate import measure_link_rate

DRY = replace(W_SMALL, precision="bf16")
LARGE = {
    "1.5": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 27, "num_attention_heads": 16},
    "3": {"hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 36, "num_attention_heads": 20},
    "7.6": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 32},
}
SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
GIB = 2**30


@dataclass(frozen=True)
class Turn:
    """What one turn measured."""

    tokens_per_s: float
    step_s: float
    device_bytes: int
    host_bytes: int
    loss: float


def make_model(arguments: argparse.Namespace, device: torch.device, level: Any) -> Any:
    """Make the model with random weights, the same for every call."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape, workload = (SMALL, DRY) if arguments.dry else (LARGE[arguments.billions], W)
    config = LlamaConfig(
        **shape,
        vocab_size=1_000 if arguments.dry else 32_000,
        max_position_embeddings=workload.longest,
        tie_word_embeddings=False,
    )
    make = partial(AutoModelForCausalLM.from_config, config, dtype=torch.float32)
    return move_to_device(filled_in_parallel(make, 0).train(), device, offload=level)


def make_windows(arguments: argparse.Namespace, batches: int, number: int) -> list[list[dict[str, torch.Tensor]]]:
    """Make the samples of each window, of so many batches of W."""
    workload, vocabulary = (W_SMALL, 1_000) if arguments.dry else (W, 32_000)
    return [
        shift(
            [
                {"input_ids": ids, "labels": ids}
                for part in range(batches)
                for ids in workload.make_sequences(vocabulary=vocabulary, seed=seed * batches + part)
            ]
        )
        for seed in range(number)
    ]


def run_turn(arguments: argparse.Namespace, level: Any, batches: int, device: torch.device) -> Turn:
    """Train some windows at one level, and measure the later ones."""
    is_cuda = device.type == "cuda"
    gc.collect()
    if is_cuda:
        torch.cuda.empty_cache()
    model = make_model(arguments, device, level)
    settings = {"compile": arguments.compile, "gradient_checkpointing": arguments.checkpointing}
    model_setup = set_up(model, DRY if arguments.dry else W, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    engine = make_engine(
        model_setup, optimizer, microbatch=TokenBudget(arguments.tokens), max_grad_norm=1.0, offload=level
    )
    windows = make_windows(arguments, batches, arguments.warm_up + arguments.updates)
    seconds: list[float] = []
    events: list[tuple[Any, Any]] = []
    inner = engine.accumulator.update.steps.run

    def timed(*words: Any, **settings: Any) -> None:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if is_cuda else (None, None)
        if is_cuda:
            first.record()
        inner(*words, **settings)
        if is_cuda:
            last.record()
            events.append((first, last))

    engine.accumulator.update.steps.run = timed  # type: ignore[method-assign]
    for number, window in enumerate(windows):
        if number == arguments.warm_up and is_cuda:
            events.clear()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started_s = time.perf_counter()
        report = engine.step(window)
        if is_cuda:
            torch.cuda.synchronize()
        if number >= arguments.warm_up:
            seconds.append((time.perf_counter() - started_s) / sum(len(sample["input_ids"]) for sample in window))
    offload, layers = engine.accumulator.update.offload, model_setup.layers
    steps = [first.elapsed_time(last) / 1000 for first, last in events]
    turn = Turn(
        1 / statistics.median(seconds),
        statistics.median(steps) if steps else 0.0,
        torch.cuda.max_memory_allocated() if is_cuda else 0,
        (0 if offload is None else offload.host_bytes) + (0 if layers is None else layers.inputs.host_bytes),
        report.loss,
    )
    engine.release_cuda_graphs()
    return turn


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", default="1,4", help="batches of W in one window")
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--compile", default="none")
    parser.add_argument("--checkpointing", default="full")
    parser.add_argument("--levels", default=",".join(LEVELS))
    parser.add_argument("--billions", choices=LARGE, default="1.5")
    parser.add_argument("--memory", type=float, help="GiB that torch may allocate on the card; default: all")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.quick or arguments.dry:
        arguments.rounds, arguments.batches = 1, "1"
    if arguments.dry:
        arguments.tokens = 512
    device = torch.device("cpu" if arguments.dry else "cuda")
    if arguments.memory is not None and not arguments.dry:
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.memory * GIB / total_bytes))
    name = platform.processor() or "CPU" if arguments.dry else torch.cuda.get_device_name()
    lines = [
        f"{name}, torch {torch.__version__}, rows of {arguments.tokens:,} tokens, compile {arguments.compile}, "
        f"checkpointing {arguments.checkpointing}, "
        f"{arguments.billions} billion parameters, {arguments.memory or 'all'} GiB"
    ]
    if (link_rate := measure_link_rate(device)) is not None:
        lines.append(f"link {link_rate / 1e9:.1f} GB/s in each direction")
    turns: dict[tuple[int, str], list[Turn]] = defaultdict(list)
    print("\n".join(lines), flush=True)
    for number in range(arguments.rounds):
        for batches in map(int, arguments.batches.split(",")):
            for level in arguments.levels.split(","):
                turn = run_turn(arguments, level, batches, device)
                turns[batches, level].append(turn)
                lines.append(f"round {number}, {batches} × W, {level}: {turn}")
                print(lines[-1], flush=True)
    lines += [
        "",
        f"{'window':>8} {'level':>10} {'tokens/s':>10} {'of none':>8} {'step s':>7} {'device':>8} {'host':>8} "
        f"{'loss':>10}",
    ]
    for (batches, level), found in turns.items():
        speed = statistics.median(turn.tokens_per_s for turn in found)
        base = turns.get((batches, "none"), found)
        share = speed / statistics.median(turn.tokens_per_s for turn in base)
        lines.append(
            f"{batches:>6}×W {level:>10} {speed:>10,.0f} {share:>8.3f} "
            f"{statistics.median(turn.step_s for turn in found):>7.3f} "
            f"{max(turn.device_bytes for turn in found) / GIB:>8.2f} {max(t.host_bytes for t in found) / GIB:>8.2f} "
            f"{found[-1].loss:>10.6f}"
        )
    text = "\n".join(lines)
    print(text[text.index("\n\n") :])
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
