"""Overhead of an exact window compared with a correct hand-written loop, interleaved in one run.

    python benchmarks/overhead.py [--rounds 40] [--threads 1]

The hand-written loop does the same work as a window: backward on sums, one division by the items, norm and clipping,
the finite check, the step, zeroing gradients, the summed loss. Accumulator and Engine have their defaults: they also
measure the gradient noise scale, in one window of eight. Both loops train the same model with the same optimizer on the
same micro-batches, interleaved in a rotating order. ``ratio`` divides the medians of the wall time, ``mean`` the means
of the process time: the first does not see what one window in eight costs, the second does, and is less affected by
other processes. The hand-written loop against itself shows the noise floor.

glibc's malloc is told to keep freed memory: else it returns the end of the heap to the system in some windows of some
loops, which then fault 200 to 6,000 pages each, depending on the layout of the heap (up to 8 % either way, also between
two hand-written loops).
"""

import argparse
import ctypes
import math
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from bigbatch.scaling.noise_scale import MEASURE_FIRST

VOCABULARY = 256
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class Decoder(nn.Module):
    """A plain causal transformer: embedding, ``layers`` encoder layers under a causal mask, untied head."""

    def __init__(self, *, layers: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [rows, length] to logits [rows, length, VOCABULARY]."""
        hidden = self.embedding(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return self.head(hidden)


def loss_fn(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
    """Return the sum of the next-token losses of tokens [rows, length], and their number."""
    logits, labels = model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    return F.cross_entropy(logits, labels, reduction="sum"), labels.numel()


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, microbatch: int) -> float:
    """Run one update of a correct hand-written loop."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses, items = [], 0
    for rows in tokens.split(microbatch):
        loss_sum, count = loss_fn(model, rows)
        loss_sum.backward()
        losses.append(loss_sum.detach())
        items += count
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_div_(gradients, items)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    if math.isfinite(norm.item()):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses).sum().item() / items


def contenders(*, layers: int, width: int, microbatch: int) -> dict[str, Callable[[Tensor], float]]:
    """Return four loops over separate, equally initialized models: by hand (twice), Accumulator, Engine."""

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = Decoder(layers=layers, width=width)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    def hand() -> Callable[[Tensor], float]:
        model, optimizer = fresh()
        return lambda tokens: by_hand(model, optimizer, tokens, microbatch)

    def accumulator() -> Callable[[Tensor], float]:
        model, optimizer = fresh()
        windows = bigbatch.Accumulator(model, optimizer, max_grad_norm=1.0)

        def run(tokens: Tensor) -> float:
            parts = tokens.split(microbatch)
            (window,) = (windows.windows(parts, num_microbatches=len(parts)),)
            for opened in window:
                for rows in opened:
                    loss_sum, items = loss_fn(model, rows)
                    opened.backward(loss_sum, items=items)
                report = opened.step()
            return report.loss

        return run

    def engine() -> Callable[[Tensor], float]:
        model, optimizer = fresh()
        whole = bigbatch.Engine(model, optimizer, loss_fn, microbatch=microbatch, max_grad_norm=1.0)
        return lambda tokens: whole.step(tokens).loss

    return {"by hand": hand(), "by hand, again": hand(), "Accumulator": accumulator(), "Engine": engine()}


def measure(
    runs: dict[str, Callable[[Tensor], float]], tokens: Tensor, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Return wall and process seconds of each update; contenders alternate in a rotating order."""
    names = list(runs)
    losses = {name: [run(tokens) for _ in range(MEASURE_FIRST)][-1] for name, run in runs.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-4, losses
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter(), time.process_time()
            runs[name](tokens)
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return times


def summary(times: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the median of the wall times, and the mean of the process times."""
    return statistics.median(wall for wall, _ in times), statistics.mean(process for _, process in times)


def keep_freed_memory() -> None:
    """Let malloc return no memory to the system; no-op without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**25)  # its maximum


def main() -> None:
    """Print the table."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=40, help="timed updates of each contender, five times as many of the small model"
    )
    parser.add_argument("--threads", type=int, default=1, help="number of torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, CPU, {options.threads} thread(s)")
    print(f"{'model':<36}{'loop':<17}{'ms/update':>10}{'ratio':>8}{'bound':>8}{'mean':>8}")
    shapes = {
        "4 layers, d=128, 8 of 4 × 64 tokens": ({"layers": 4, "width": 128, "microbatch": 4}, (32, 65), 1.02, 1),
        "1 layer, d=32, 32 of 1 × 16 tokens": ({"layers": 1, "width": 32, "microbatch": 1}, (32, 17), 1.06, 5),
    }
    for label, (setting, shape, bound, more) in shapes.items():
        tokens = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
        times = measure(contenders(**setting), tokens, options.rounds * more)
        base = summary(times["by hand"])
        for name, seconds in times.items():
            median, mean = summary(seconds)
            shown = f"{bound:.2f}" if name in ("Accumulator", "Engine") else ""
            print(
                f"{label:<36}{name:<17}{1e3 * median:>10.2f}{median / base[0]:>8.3f}{shown:>8}{mean / base[1]:>8.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
