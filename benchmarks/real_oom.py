"""A real out-of-memory error in mid-window on a GPU: the update equals that of the run with enough memory.

    python benchmarks/real_oom.py [--cap-gib 2]

A decoder of 4 layers of width 512 in float32 runs 64 sequences of 512 tokens in one micro-batch, first with all memory
(3.9 GiB at its peak), then limited by `set_per_process_memory_fraction` to less than that. The second run has real
out-of-memory errors, and the table compares the gradients that the optimizer receives. float32 kernels round
differently for other shapes, so the bound is that of `verify`, 2e-5.
"""

import argparse

import torch
from torch import Tensor

import bigbatch
from overhead import VOCABULARY, Decoder, loss_fn


class GradientLog(torch.optim.SGD):
    """SGD that keeps the gradients of its last step."""

    def step(self, closure: object = None) -> None:
        """Save the gradients without changing the parameters."""
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def run(tokens: Tensor, windows: int) -> tuple[list[Tensor], list[bigbatch.WindowReport]]:
    """Return the last window's gradients and the reports."""
    torch.manual_seed(0)
    model = Decoder(layers=4, width=512).cuda()
    optimizer = GradientLog(model.parameters())
    engine = bigbatch.Engine(model, optimizer, loss_fn, microbatch=len(tokens))
    reports = [engine.step(tokens) for _ in range(windows)]
    return [gradient.cpu() for gradient in optimizer.seen], reports


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cap-gib", type=float, default=2.0, help="memory of the second run")
    options = parser.parse_args()
    torch.set_default_device("cpu")
    tokens = torch.randint(VOCABULARY, (64, 513), generator=torch.Generator().manual_seed(0))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    expected, (free,) = run(tokens, 1)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(options.cap_gib * 2**30 / total)
    torch.cuda.reset_peak_memory_stats()
    found, reports = run(tokens, 12)
    norm = torch.nn.utils.get_total_norm
    error = norm([a - b for a, b in zip(found, expected, strict=True)]) / norm(expected)
    print(f"{'':<28}{'micro-batches':>14}{'out of memory':>15}{'items':>8}{'peak GiB':>10}")
    rows = {"all memory": free} | {f"capped, window {n}": reports[n - 1] for n in (1, 2, 4, 8, 12)}
    for name, report in rows.items():
        peak_gib = report.peak_bytes / 2**30
        print(f"{name:<28}{report.num_microbatches:>14}{report.retries:>15}{report.items:>8}{peak_gib:>10.2f}")
    print(f"relative difference of the gradients: {error.item():.1e} (tolerance of float32: 2e-05)")


if __name__ == "__main__":
    main()
