"""Time, memory and error of batch norm over the whole batch, compared with plain accumulation and the whole batch.

    python benchmarks/batch_norm.py [--batch 128] [--microbatch 16] [--rounds 5] [--threads 1]
    python benchmarks/batch_norm.py --device cuda --width 64 --pixels 112 --batch 128 --microbatch 16

The model is a residual network of four stages with two blocks each, as ResNet-18, with batch norm after every
convolution. Each row is one window: all samples in one micro-batch, micro-batches that normalize by themselves, and
``batch_norm="exact"``, also with twice and four times the batch and the same micro-batch.

``ms`` is the median of the process time on the CPU, and of the time on CUDA, in a rotating order; ``ratio`` is that of
the time per sample to plain accumulation. ``peak`` is that of tensors on the device, without the batch, which is on the
host: on the CPU it includes the activations of all samples, on CUDA they are in host memory.

``gradient error`` and ``statistics`` are the relative errors of the gradient and of the running statistics against the
whole batch, in float64, of a batch of 32 small images. In float32 the gradients of this network differ from those in
float64 by 2e-3, in one piece as well: rounding changes the sign of the input of some ReLU.
"""

import argparse
import platform
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch
from bigbatch.memory.allocation_tracker import AllocationTracker, MemoryCategory

CLASSES = 10
Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Two convolutions with batch norm and a residual."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map [samples, inputs, height, width] to [samples, outputs, height / stride, width / stride]."""
        hidden = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x), inplace=True)


def resnet(width: int) -> nn.Sequential:
    """Return a network of four stages."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        layers += [Block(inputs, outputs, 1 if stage == 0 else 2), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


def images(count: int, num_pixels: int) -> Batch:
    """Return images on the host, with labels."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(count, 3, num_pixels, num_pixels, generator=generator)
    return pixels, torch.randint(CLASSES, (count,), generator=generator)


def classify(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Return the loss of a micro-batch."""
    pixels, labels = batch
    return F.cross_entropy(model(pixels), labels, reduction="sum"), len(labels)


def engine_of(model: nn.Module, microbatch: int, batch_norm: Any) -> bigbatch.Engine:
    """Return an engine without optimizer."""
    return bigbatch.Engine(
        model, None, classify, microbatch=microbatch, batch_norm=batch_norm, noise=False, check=False
    )


def seconds_of(engine: bigbatch.Engine, batch: Batch, device: torch.device) -> float:
    """Return the time of one window."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    _synchronize(device)
    started_s = clock()
    engine.backward(batch)
    _synchronize(device)
    return clock() - started_s


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_of(engine: bigbatch.Engine, batch: Batch, device: torch.device) -> int:
    """Return the peak of tensors on the device in one window, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        engine.backward(batch)
        return torch.cuda.max_memory_allocated(device)  # waits for nothing: allocations are made on the host
    with AllocationTracker(device) as tracker:
        tracker.track([*engine.model.parameters(), *engine.model.buffers()], MemoryCategory.PARAMETERS)
        engine.backward(batch)
    return int(tracker.peak_bytes)


def errors_of(batch_norm: Any, device: torch.device) -> list[float]:
    """Return the errors of the gradient and of the running statistics with micro-batches of 4, in float64."""
    pixels, labels = images(32, 16)
    found = []
    for cut, norm in ((4, batch_norm), (32, None)):
        engine = engine_of(resnet(8).to(device, torch.float64), cut, norm)
        engine.backward((pixels.double(), labels))
        gradients = [p.grad for p in engine.model.parameters() if p.grad is not None]
        running = [buffer for name, buffer in engine.model.named_buffers() if "running" in name]
        found.append([torch.cat([tensor.flatten() for tensor in each]) for each in (gradients, running)])
    return [float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True)]


def compare(options: argparse.Namespace) -> None:
    """Print one row for each way to run a batch."""
    device, size, cut = options.device, options.batch, options.microbatch
    kinds: dict[str, tuple[int, Any, int]] = {
        "whole batch": (size, None, size),
        "plain accumulation": (cut, None, size),
        'batch_norm="exact"': (cut, "exact", size),
        "the same, batch × 2": (cut, "exact", 2 * size),
        "the same, batch × 4": (cut, "exact", 4 * size),
    }
    batch, names = images(4 * size, options.pixels), list(kinds)
    engines = {name: engine_of(resnet(options.width).to(device), cut_, norm) for name, (cut_, norm, _) in kinds.items()}
    parts = {name: (batch[0][:count], batch[1][:count]) for name, (_, _, count) in kinds.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(options.rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds = seconds_of(engines[name], parts[name], device)
            if turn:  # the first window of each allocates what is created on first use
                times[name].append(seconds)
    per_sample = {name: statistics.median(seconds) / len(parts[name][1]) for name, seconds in times.items()}
    title = f"{cut} samples at a time"
    print(f"{title:<24}{'samples':>8}{'ms':>10}{'ratio':>8}{'peak MiB':>11}{'gradient error':>16}{'statistics':>12}")
    for name, (_, norm, count) in kinds.items():
        ratio = per_sample[name] / per_sample["plain accumulation"]
        peak = peak_of(engines[name], parts[name], device) / 2**20
        errors = ""
        if name != "whole batch" and count == size:
            errors = "{:>16.1e}{:>12.1e}".format(*errors_of(norm, device))
        print(
            f"{name:<24}{count:>8}{1e3 * per_sample[name] * count:>10.1f}{ratio:>8.2f}{peak:>11.1f}{errors}", flush=True
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--pixels", type=int, default=32, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=128, help="samples of the batch")
    parser.add_argument("--microbatch", type=int, default=16, help="samples of a micro-batch")
    parser.add_argument("--rounds", type=int, default=5, help="timed windows of each kind")
    parser.add_argument("--threads", type=int, default=1, help="number of torch threads on the CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {where}, {options.threads} thread(s)")
    compare(options)


if __name__ == "__main__":
    main()
