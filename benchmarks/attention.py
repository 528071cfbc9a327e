"""The attention kernel of torch and FlashAttention-4 for packed rows: one layer, and whole updates of W in 24 GiB.

    python benchmarks/attention.py [--rounds 3] [--memory 24GiB] [--only layer,update]

On one Hopper or Blackwell card with flash-attn-4 (`pip install "bigbatch[fa4]"`). The layer table has the median time
of forward and backward, replayed as CUDA graphs in alternation, and the error of results and gradients against
attention in float64. The updates run in alternation on one model, set up and tuned as in `bigbatch train`; their
gradient is compared with that of the padded loop in float32.
"""

import argparse
import statistics
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbatch.lm.bench.benchmark import reference_gradient
from bigbatch.lm.bench.bigbatch_runner import BigbatchRunner
from bigbatch.lm.bench.meter import GradientMeter, Timer
from bigbatch.lm.bench.shared_model import SharedModel
from bigbatch.lm.bench.workload import W, count_tokens
from bigbatch.lm.model.attention_choice import median_time
from bigbatch.lm.model.causal_attention import NAMES, Kernel, attend_packed
from bigbatch.memory.usage import free_cached_memory

SHAPES: dict[str, tuple[int, int, int]] = {"W": (14, 2, 64), "7 B": (28, 4, 128)}  # heads, key heads, width
TURNS = 5


def lengths_of(tokens: int) -> list[int]:
    """Return lengths of sequences of W with so many tokens in all."""
    lengths: list[int] = []
    for sequence in W.make_sequences():
        lengths.append(min(len(sequence), tokens - sum(lengths)))
        if sum(lengths) == tokens:
            break
    return lengths


def make(shape: tuple[int, int, int], tokens: int) -> list[Tensor]:
    """Make query, key and value in bfloat16."""
    torch.manual_seed(0)
    heads, key_heads, width = shape
    return [
        torch.randn(1, number, tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for number in (heads, key_heads, key_heads)
    ]


def run(kernel: Kernel, tensors: list[Tensor], offsets: Tensor, longest: int) -> list[Tensor]:
    """Return the result ``[1, tokens, heads, width]``, and the gradients of its sum of squares."""
    attended = attend_packed(*tensors, offsets, longest, kernel=kernel)
    return [attended.detach(), *torch.autograd.grad(attended, tensors, attended.detach())]


def exact(tensors: list[Tensor], lengths: list[int]) -> list[Tensor]:
    """Return what `run` does, one sequence at a time in float64."""
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    parts = []
    for part in (tensor.split(lengths, 2) for tensor in [torch.cat(wide, 1)]):
        for row in part:
            query, key, value = row.split([tensor.shape[1] for tensor in wide], 1)
            parts.append(F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True))
    attended = torch.cat(parts, 2).transpose(1, 2)
    return [attended.detach(), *torch.autograd.grad(attended, wide, attended.detach())]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest relative error of several tensors."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def layer_rows() -> None:
    """Print the times and errors of one layer."""
    print(f"{'layer':24} {'torch, ms':>10} {'FA4, ms':>10} {'ratio':>7}   relative error against float64, torch / FA4")
    for name, shape in SHAPES.items():
        for lengths in (lengths_of(12_288), lengths_of(2_048), [8_192]):
            tokens, longest = sum(lengths), 8_192 if len(lengths) == 1 else W.longest
            tensors = make(shape, tokens)
            offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
            times: dict[Kernel, list[float]] = {kernel: [] for kernel in NAMES}
            for _ in range(TURNS):
                for kernel in NAMES:
                    call = partial(run, kernel, tensors, offsets, longest)
                    times[kernel].append(median_time(call, tensors[0].device, captured=True))
            ours = {kernel: statistics.median(values) for kernel, values in times.items()}
            title = f"{name}, {tokens:,} in {len(lengths)}"
            errors = "not compared"
            if tokens <= 2_048:
                expected = exact(tensors, lengths)
                errors = " / ".join(
                    f"{error(run(kernel, tensors, offsets, longest), expected):.1e}" for kernel in NAMES
                )
            ratio = ours["fa4"] / ours["torch"]
            print(f"{title:24} {ours['torch']:10.3f} {ours['fa4']:10.3f} {ratio:7.2f}   {errors}", flush=True)


def update_rows(rounds: int, memory: str | None) -> None:
    """Print the tokens per second of whole updates of W."""
    stage = SharedModel(W, memory)
    reference = reference_gradient(stage)
    tokens = count_tokens(stage.samples)
    runners: dict[str, Any] = {kernel: BigbatchRunner(attention=kernel) for kernel in NAMES}
    speeds: dict[str, list[float]] = {kernel: [] for kernel in runners}
    peaks, cosines = dict.fromkeys(runners, 0), dict.fromkeys(runners, 0.0)
    for turn in range(rounds + 1):
        for kernel, runner in runners.items():
            timer = Timer(stage.device)
            meter = timer if turn else GradientMeter(stage, reference, timer=timer)
            started_s = time.perf_counter()
            with stage.isolated():
                runner.turn(stage, meter)
            free_cached_memory()
            if isinstance(meter, GradientMeter):
                meter.close()
                cosines[kernel] = meter.similarity.cosine if meter.similarity else 0.0
                print(
                    f"{kernel}: first turn {time.perf_counter() - started_s:.0f} s; {'; '.join(runner.notes)}",
                    flush=True,
                )
            else:
                speeds[kernel].append(tokens / timer.elapsed_s)
            peaks[kernel] = max(peaks[kernel], timer.peak_bytes or 0)
    print(f"{'W, ' + (memory or 'no limit'):24} {'tokens/s':>10} {'GiB':>6} {'cosine':>9}")
    for kernel in runners:
        speed = statistics.median(speeds[kernel])
        print(f"{kernel:24} {speed:10,.0f} {peaks[kernel] / 2**30:6.1f} {cosines[kernel]:9.5f}", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default="24GiB")
    parser.add_argument("--only", default="layer,update")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if "layer" in arguments.only:
        layer_rows()
    if "update" in arguments.only:
        update_rows(arguments.rounds, None if arguments.memory == "none" else arguments.memory)


if __name__ == "__main__":
    main()
