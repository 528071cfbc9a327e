"""Full AdamW training with state in host memory: `offload` of bigbatch beside the CPU offload optimizer of torchao.

    python benchmarks/offload_rivals.py [--billions 1.5] [--rounds 2] [--levels master,gradients]     # CUDA, torchao
    python benchmarks/offload_rivals.py --dry                         # a tiny model on the CPU, with AdamW alone

The Llama of `offload.py`, float32 weights under bf16 autocast, eager layers whose activations are recomputed, windows
of W (92,493 tokens) in packed rows of ``--tokens`` tokens. ``torchao`` is ``torchao.optim.CPUOffloadOptimizer`` around
torch's fused AdamW in the usual loop: a loss for each row, gradients summed in ``.grad`` on the card,
``clip_grad_norm_``; the optimizer copies them to the host, steps there, and copies the weights back. Its gradients stay
on the card, since ``offload_gradients=True`` does not accumulate. Each turn makes the model anew and runs ``--warm-up``
updates, then ``--updates`` that are timed. *Device* is the highest memory of torch's allocator in the timed updates.
"""

import argparse
import gc
import statistics
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bigbatch.lm.bench.bigbatch_runner import set_up
from bigbatch.lm.bench.workload import W
from offload import DRY, GIB, LARGE, Turn, make_model, make_windows, run_turn

TORCHAO = "torchao"


class CpuOffload:
    """The usual loop with torchao's optimizer."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.model = make_model(arguments, device, "none")
        workload = DRY if arguments.dry else W
        self.setup = set_up(
            self.model, workload, compile=arguments.compile, gradient_checkpointing=arguments.checkpointing
        )
        self.optimizer = make_optimizer(self.model, device)
        self.tokens, self.device = arguments.tokens, device

    def step(self, window: list[dict[str, torch.Tensor]]) -> float:
        """Run one update, and return its mean loss."""
        items = sum(int((sample["labels"] != -100).sum()) for sample in window)
        losses = []
        for rows in self.rows(window):
            microbatch = {name: tensor.to(self.device) for name, tensor in self.setup.collate(rows).items()}
            found: Any = self.setup.loss_fn(self.model, microbatch)
            loss = found[0] / items
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(torch.stack(losses).sum())

    def rows(self, window: list[dict[str, torch.Tensor]]) -> list[list[dict[str, torch.Tensor]]]:
        """Pack the samples in order, up to ``tokens`` in a row."""
        rows: list[list[dict[str, torch.Tensor]]] = [[]]
        used = 0
        for sample in window:
            length = len(sample["input_ids"])
            if rows[-1] and used + length > self.tokens:
                rows.append([])
                used = 0
            rows[-1].append(sample)
            used += length
        return rows


def make_optimizer(model: Any, device: torch.device) -> Any:
    """Return torchao's optimizer, which needs CUDA; in dry runs AdamW alone."""
    if device.type == "cpu":
        return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    from torchao.optim import CPUOffloadOptimizer

    return CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-5, fused=True)


def torchao_turn(arguments: argparse.Namespace, device: torch.device) -> Turn:
    """Train some windows with torchao, and measure the later ones."""
    is_cuda = device.type == "cuda"
    gc.collect()
    if is_cuda:
        torch.cuda.empty_cache()
    loop = CpuOffload(arguments, device)
    seconds, loss = [], 0.0
    for number, window in enumerate(make_windows(arguments, 1, arguments.warm_up + arguments.updates)):
        if number == arguments.warm_up and is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started_s = time.perf_counter()
        loss = loop.step(window)
        if is_cuda:
            torch.cuda.synchronize()
        if number >= arguments.warm_up:
            seconds.append((time.perf_counter() - started_s) / sum(len(sample["input_ids"]) for sample in window))
    peak_bytes = torch.cuda.max_memory_allocated() if is_cuda else 0
    host_bytes = 16 * sum(parameter.numel() for parameter in loop.model.parameters())  # weights, gradients, two moments
    return Turn(1 / statistics.median(seconds), 0.0, peak_bytes, host_bytes, loss)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--compile", default="none")
    parser.add_argument("--checkpointing", default="full")
    parser.add_argument("--levels", default="optimizer,master,gradients", help="of bigbatch")
    parser.add_argument("--billions", choices=LARGE, default="1.5")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.dry:
        arguments.tokens = 512
    device = torch.device("cpu" if arguments.dry else "cuda")
    name = "CPU" if arguments.dry else torch.cuda.get_device_name()
    lines = [
        f"{name}, torch {torch.__version__}, torchao {version('torchao')}, {torch.get_num_threads()} threads, "
        f"{arguments.billions} billion parameters, rows of {arguments.tokens:,} tokens"
    ]
    print(lines[0], flush=True)
    turns: dict[str, list[Turn]] = defaultdict(list)
    for number in range(arguments.rounds):
        for which in [*arguments.levels.split(","), TORCHAO]:
            turn = torchao_turn(arguments, device) if which == TORCHAO else run_turn(arguments, which, 1, device)
            turns[which].append(turn)
            lines.append(f"round {number}, {which}: {turn}")
            print(lines[-1], flush=True)
    lines += ["", f"{'':>10}{'tokens/s':>10}{'device':>8}{'host':>8}{'loss':>11}"]
    for which, found in turns.items():
        speed = statistics.median(turn.tokens_per_s for turn in found)
        device_gib, host_gib = (max(getattr(t, f"{where}_bytes") for t in found) / GIB for where in ("device", "host"))
        lines.append(f"{which:>10}{speed:>10,.0f}{device_gib:>8.2f}{host_gib:>8.2f}{found[-1].loss:>11.6f}")
    print("\n".join(lines[lines.index("") :]))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
