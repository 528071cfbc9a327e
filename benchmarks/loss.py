"""Time, memory and error of the loss without logits, compared with the loss with logits and with other libraries.

    python benchmarks/loss.py                            on CUDA
    python benchmarks/loss.py --device cpu               small shapes, to try the script: no peak, times mean little

Forward and backward of a head alone, at the shapes of GPT-2, Qwen2 0.5B and Llama 3 1B, with a seventh of the labels
ignored. The error is that of the weight's gradient against float64 in chunks. Liger Kernel and
`torch.nn.functional.linear_cross_entropy` are skipped if not available.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbatch.lm.model.linear_cross_entropy import linear_cross_entropy

SHAPES = {"GPT-2": (768, 50257), "Qwen2 0.5B": (896, 151936), "Llama 3 1B": (2048, 128256)}
PRECISIONS = ("float32", "bf16", "bf16-weights")
CHUNKS = (512, 1024, 2048, 4096)
ROUNDS = 5
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def all_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the loss sum, from all logits at once."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def losses(precision: str, device: str, divisor: int) -> dict[str, Loss]:
    """Return the compared losses by name; chunk sizes are divided by ``divisor``."""

    def chunked(chunk_tokens: int) -> Loss:
        return lambda *tensors: linear_cross_entropy(
            tensors[0], tensors[1], None, tensors[2], chunk_tokens=chunk_tokens
        )

    found: dict[str, Loss] = {"all logits": all_logits}
    found |= {f"chunks of {size // divisor}": chunked(size // divisor) for size in CHUNKS}
    if hasattr(F, "linear_cross_entropy") and precision != "bf16":  # it ignores autocast
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=1024 // divisor)
        found["torch"] = lambda hidden, weight, labels: F.linear_cross_entropy(
            hidden, weight, labels, reduction="sum", options=options
        )
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return found
    if device == "cuda":
        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
        found["Liger Kernel"] = lambda hidden, weight, labels: liger(weight, hidden, labels)
    return found


def exact_gradient(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the weight's gradient in float64."""
    leaf = weight.detach().double().requires_grad_()
    for rows, targets in zip(hidden.detach().split(512), labels.split(512), strict=True):
        F.cross_entropy(F.linear(rows.double(), leaf), targets, reduction="sum").backward()
    assert leaf.grad is not None
    return leaf.grad


def measure(loss_fn: Loss, tensors: tuple[Tensor, Tensor, Tensor], precision: str) -> tuple[float, int, Tensor]:
    """Return milliseconds and peak bytes of forward and backward, and the weight's gradient."""
    hidden, weight, labels = tensors
    device = hidden.device.type

    def step() -> None:
        hidden.grad = weight.grad = None
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_fn(hidden, weight, labels)
        loss.backward()

    step()
    hidden.grad = weight.grad = None
    peak = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times = []
    for _ in range(ROUNDS):
        started_s = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started_s)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() - before
    assert weight.grad is not None
    return 1000 * statistics.median(times), peak, weight.grad


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    tokens, divisor = (8192, 1) if device == "cuda" else (256, 32)
    print(f"{name}, torch {torch.__version__}; {tokens} tokens, forward and backward of the head")
    print(f"{'head of':<12}{'precision':<14}{'loss':<16}{'ms':>9}{'ratio':>8}{'peak MiB':>10}{'error':>10}")
    for model, (width, vocabulary) in SHAPES.items():
        for precision in PRECISIONS:
            torch.manual_seed(0)
            options: dict[str, Any] = {"device": device, "requires_grad": True}
            options["dtype"] = torch.bfloat16 if precision == "bf16-weights" else torch.float32
            hidden = torch.randn(tokens, width // divisor, **options)
            weight = torch.empty(vocabulary // divisor, width // divisor, **options)
            torch.nn.init.normal_(weight, std=0.02)
            labels = torch.randint(vocabulary // divisor, (tokens,), device=device)
            labels[::7] = -100
            exact = exact_gradient(hidden, weight, labels)
            reference_ms = 0.0
            for kind, loss_fn in losses(precision, device, divisor).items():
                elapsed_ms, peak, gradient = measure(loss_fn, (hidden, weight, labels), precision)
                reference_ms = reference_ms or elapsed_ms
                error = float((gradient - exact).norm() / exact.norm())
                shown = f"{peak / 2**20:,.0f}" if peak else "–"
                print(
                    f"{model:<12}{precision:<14}{kind:<16}{elapsed_ms:>9.1f}{elapsed_ms / reference_ms:>8.2f}"
                    f"{shown:>10}{error:>10.1e}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
