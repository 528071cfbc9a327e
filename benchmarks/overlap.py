"""Reduction of gradients within the last backward (`bigbatch.Replicated(overlap=True)`): checks, failures and times.

    torchrun --standalone --nproc-per-node 2 benchmarks/overlap.py --rounds 5 [--out FILE]     # 2 CUDA cards, 23 s
    torchrun --standalone --nproc-per-node 2 benchmarks/overlap.py --checks-only       # no times, 12 s
    torchrun --standalone --nproc-per-node 2 benchmarks/overlap.py --cpu --rounds 1    # gloo, to try the script

CUDA cards of one host with NCCL. The checks (`benchmarks/overlap_checks.py`) print a line each, "ok" or "WRONG", and
run five updates of a small model in buckets of 20 kB; the lists show for each update whether it overlapped, which the
first never does. "same as without": parameters and buffers have the bits of a run without overlap (with more than two
ranks, they are close). "error", "out of memory", "interrupt": the last rank raises in the last micro-batch of the
third window, in its forward or at one of three places of its backward. All ranks run that window again without
overlap: after an error all updates end with the values of a run without a failure, after out of memory the gradient
of that window has the same norm. An interrupted window is dropped, with `RankFailedError` on the ranks that were not
interrupted. Retries and errors are those of the first rank. Exits with 1 if a check failed.

The times are of 24 feed-forward layers under bf16 autocast with fused AdamW. Two engines in one process, *off* and
*on*, run windows of 1, 2 and 4 micro-batches in turns. *Off* and *on* are medians over ``--rounds`` windows, of the
slowest rank; *on/off* is their ratio, *fastest* the minima, *overlapped* whether each window of *on* did. *Fused*
layers add weight gradients within their products (``fuse_gradients=True``).
"""

import argparse
import os
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the checks compare bits

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from overlap_checks import Ranks, check_all

COUNTS = (1, 2, 4)  # micro-batches of a window
WARM_UP = 2  # windows: the first learns the order of gradients
NUM_ALL_REDUCES = 5


class Block(nn.Module):
    """A feed-forward layer with norm and residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, values: Tensor) -> Tensor:
        """Return values [rows, width]."""
        added: Tensor = self.down(F.gelu(self.up(self.norm(values))))
        return values + added


def shape(device: torch.device) -> tuple[int, int, int]:
    """Return width, number of layers, and rows of a micro-batch."""
    return (1600, 24, 8192) if device.type == "cuda" else (128, 4, 64)


def make_engine(ranks: Ranks, *, overlap: bool, fuse: bool) -> bigbatch.Engine:
    """Return an engine with a model of its own."""
    on_cuda = ranks.device.type == "cuda"
    width, depth, rows = shape(ranks.device)
    torch.manual_seed(0)
    with ranks.device:
        model = nn.Sequential(*(Block(width) for _ in range(depth)))

    def loss_fn(model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=on_cuda):
            return F.mse_loss(model(batch).float(), batch, reduction="sum"), batch.shape[0]

    return bigbatch.Engine(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-5, fused=on_cuda),
        loss_fn,
        microbatch=rows,
        sync=bigbatch.Replicated(model, overlap=overlap),
        check=False,
        noise=False,
        fuse_gradients=fuse,
    )


def start(device: torch.device) -> float:
    """Wait for the device and for all ranks, and return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def elapsed_ms(started_s: float, device: torch.device) -> float:
    """Wait for the device, and return the milliseconds since then."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started_s)


def step_ms(engine: bigbatch.Engine, batch: Tensor) -> tuple[float, bool]:
    """Return the milliseconds of a window on the slowest rank, and whether it overlapped. Collective."""
    started_s = start(batch.device)
    report = engine.step(batch)
    elapsed = torch.tensor([elapsed_ms(started_s, batch.device)], device=batch.device)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    assert report.ranks is not None
    return elapsed.item(), report.ranks.overlapped


def all_reduce_ms(num_elements: int, device: torch.device) -> float:
    """Return the median of all-reduces of so many float32 values. Collective."""
    flat = torch.zeros(num_elements, device=device)
    times = []
    for _ in range(NUM_ALL_REDUCES):
        started_s = start(device)
        dist.all_reduce(flat)
        times.append(elapsed_ms(started_s, device))
    return statistics.median(times)


def time_windows(
    engines: dict[str, bigbatch.Engine], batch: Tensor, num_rounds: int
) -> tuple[dict[str, list[float]], bool]:
    """Run windows in turns, the first round uncounted; return their times, and whether all of "on" overlapped."""
    times: dict[str, list[float]] = {"off": [], "on": []}
    flags = []
    for number in range(num_rounds + 1):
        for name in ("off", "on") if number % 2 else ("on", "off"):
            elapsed, overlapped = step_ms(engines[name], batch)
            if number:
                times[name].append(elapsed)
            if name == "on":
                flags.append(overlapped)
    return times, all(flags)


def show_times(ranks: Ranks, num_rounds: int) -> None:
    """Print the table of times. Collective."""
    device = ranks.device
    width, _, rows = shape(device)
    generator = torch.Generator(device).manual_seed(ranks.rank)
    data = torch.randn(max(COUNTS) * rows, width, device=device, generator=generator)
    for fuse in (False, True):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        engines = {name: make_engine(ranks, overlap=name == "on", fuse=fuse) for name in ("off", "on")}
        if not fuse:
            number = sum(parameter.numel() for parameter in engines["on"].model.parameters())
            millions = f"{number / 1e6:.0f} million float32 parameters"
            ranks.say(f"\n{millions}, {rows} rows a micro-batch, {ranks.size} ranks, {device.type}")
            ranks.say(f"one all-reduce of all gradients: {all_reduce_ms(number, device):.1f} ms")
            title = f"{'layers':<8}{'micro-batches':>14}{'off, ms':>10}{'on, ms':>10}{'on/off':>9}"
            ranks.say(f"{title}{'fastest off':>13}{'on':>8}  overlapped")
        for engine in engines.values():
            for _ in range(WARM_UP):
                step_ms(engine, data[:rows])
        for count in COUNTS:
            times, overlapped = time_windows(engines, data[: count * rows], num_rounds)
            off, on = (statistics.median(times[name]) for name in ("off", "on"))
            ranks.say(
                f"{'fused' if fuse else 'plain':<8}{count:>14}{off:>10.1f}{on:>10.1f}{on / off:>9.3f}"
                f"{min(times['off']):>13.1f}{min(times['on']):>8.1f}  {overlapped}"
            )
        if device.type == "cuda":
            ranks.say(f"peak of both engines: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        del engine, engines  # before the next ones are made


def main() -> int:
    """Run the checks and the times, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="windows of each kind that are timed (default: 9)")
    parser.add_argument("--checks-only", action="store_true", help="measure no times")
    parser.add_argument("--cpu", action="store_true", help="a tiny model over gloo")
    parser.add_argument("--out", type=Path, help="file that receives the output too")
    options = parser.parse_args()
    started_s = time.perf_counter()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu") if options.cpu else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    with ExitStack() as stack:
        file = None
        if options.out is not None and rank == 0:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(options.out.open("w", encoding="utf-8"))
        if not options.cpu:
            torch.cuda.set_device(device)
        dist.init_process_group("gloo" if options.cpu else "nccl", device_id=None if options.cpu else device)
        ranks = Ranks(rank, size, device, file)
        check_all(ranks)
        ranks.say(f"checks: {time.perf_counter() - started_s:.0f} s")
        if not options.checks_only:
            show_times(ranks, options.rounds)
        result = "FAILED: " + "; ".join(ranks.failed) if ranks.failed else "all checks passed"
        ranks.say(f"\n{result}; {time.perf_counter() - started_s:.0f} s")
        dist.barrier()  # torchrun ends the first rank when another one has failed
        dist.destroy_process_group()
    return 1 if ranks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
