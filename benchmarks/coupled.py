"""Time and memory of a contrastive update with `bigbatch.Coupled`, compared with plain accumulation.

    python benchmarks/coupled.py [--rounds 9] [--threads 1] [--largest 4096]

The model is a small CLIP: a transformer over 64 patches of an image and one over 32 tokens of a text, 32 pairs at a
time.

Time: one window of 256 pairs. "plain accumulation" computes the loss of each micro-batch on its own, which is not the
loss of the batch (the column ``gradient error``); "Coupled" encodes every pair twice. "and one forward" is plain
accumulation after one forward without gradients: the least that two passes can cost. Each runs in an engine of its own,
in a rotating order; ``ratio`` divides the medians of the process time.

Memory: the peak of one window by tensors (an `AllocationTracker`), for batches from 64 to 4,096 pairs. The loss runs
over blocks of rows with activation checkpointing: otherwise its matrices of similarities, 64 MiB each for 4,096 pairs,
are more than the model needs. ``features`` are the features of all samples and their gradients; ``ratio`` divides the
peak without them by that of the smallest batch.
"""

import argparse
import platform
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bigbatch
from bigbatch.memory.allocation_tracker import AllocationTracker, MemoryCategory

MICROBATCH = 32
BATCH = 256
WIDTH, PATCHES, TOKENS, VOCABULARY, FEATURES = 64, 64, 32, 512, 64
BLOCK = 128
LARGEST_RATIO, LARGEST_MEMORY = 1.45, 1.02


class Clip(nn.Module):
    """Two transformers, mean pooling, linear projections, and a learned scale."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.patches = nn.Linear(48, WIDTH)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.ParameterList([torch.randn(PATCHES, WIDTH) / 10, torch.randn(TOKENS, WIDTH) / 10])
        self.towers = nn.ModuleList(
            nn.Sequential(
                *(
                    nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
                    for _ in range(layers)
                )
            )
            for _ in range(2)
        )
        self.projections = nn.ModuleList(nn.Linear(WIDTH, FEATURES, bias=False) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(2.659))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Map images [samples, patches, 48] and texts [samples, tokens] to features [samples, FEATURES]."""
        inputs = self.patches(images) + self.places[0], self.tokens(texts) + self.places[1]
        hidden = [tower(values).mean(1) for tower, values in zip(self.towers, inputs, strict=True)]
        left, right = (projection(values) for projection, values in zip(self.projections, hidden, strict=True))
        return left, right


def encode(model: Clip, pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the features of a micro-batch."""
    return model(*pairs)


LOSS = bigbatch.losses.clip(logit_scale=lambda model: model.log_scale.exp())


def loss_in_blocks(model: Clip, features: tuple[Tensor, Tensor]) -> Tensor:
    """Compute CLIP's loss over blocks of rows, whose similarities are computed again in the backward."""
    left, right = (F.normalize(feature, dim=-1) for feature in features)

    def block(rows: Tensor, columns: Tensor, scale: Tensor, start: int) -> Tensor:
        labels = torch.arange(start, start + len(rows))
        return F.cross_entropy(scale.exp() * rows @ columns.T, labels, reduction="sum")

    total = torch.zeros(())
    for rows, columns in ((left, right), (right, left)):
        for start in range(0, len(rows), BLOCK):
            part = rows[start : start + BLOCK]
            total = total + checkpoint(block, part, columns, model.log_scale, start, use_reentrant=False)
    return total / (2 * len(left))


def of_microbatch(model: Clip, pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return the loss of a micro-batch on its own: what plain accumulation sums up."""
    return LOSS(model, encode(model, pairs)) * len(pairs[0]), len(pairs[0])


def samples(count: int) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of one image and one text."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, PATCHES, 48, generator=generator)
    texts = torch.randint(VOCABULARY, (count, TOKENS), generator=generator)
    return [(image.clone(), text.clone()) for image, text in zip(images, texts, strict=True)]


def collate(pairs: Any) -> tuple[Tensor, Tensor]:
    """Stack pairs into a micro-batch."""
    images, texts = zip(*pairs, strict=True)
    return torch.stack(images), torch.stack(texts)


def engine_of(loss_fn: Any) -> bigbatch.Engine:
    """Return an engine of a newly initialized model."""
    torch.manual_seed(0)
    return bigbatch.Engine(Clip(), None, loss_fn, microbatch=MICROBATCH, collate=collate, noise=False, check=False)


def gradient_error(loss_fn: Any) -> float:
    """Return the error against the whole batch in one piece."""
    batch = samples(BATCH)
    engine = engine_of(loss_fn)
    engine.backward(batch)
    found = [p.grad.clone() for p in engine.model.parameters()]
    engine.model.zero_grad()
    LOSS(engine.model, encode(engine.model, collate(batch))).backward()
    expected = [p.grad for p in engine.model.parameters()]
    difference = torch.nn.utils.get_total_norm([a - b for a, b in zip(found, expected, strict=True)])
    return (difference / torch.nn.utils.get_total_norm(expected)).item()


def compare_times(rounds: int) -> None:
    """Print the time of a window of each kind."""
    plain, coupled = "plain accumulation", "Coupled"
    losses = {plain: of_microbatch, "and one forward": of_microbatch, coupled: bigbatch.Coupled(encode, LOSS)}
    engines = {name: engine_of(loss_fn) for name, loss_fn in losses.items()}
    batch, names = samples(BATCH), list(losses)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % 3 :] + names[: turn % 3]:
            engine, started_s = engines[name], time.process_time()
            if name == "and one forward":
                with torch.no_grad():
                    for start in range(0, BATCH, MICROBATCH):
                        encode(engine.model, collate(batch[start : start + MICROBATCH]))
            engine.backward(batch)
            if turn:
                times[name].append(time.process_time() - started_s)
    base = statistics.median(times[plain])
    print(f"{'window of 256 pairs, 32 at a time':<36}{'ms':>9}{'ratio':>8}{'bound':>8}{'gradient error':>17}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        bound = f"{LARGEST_RATIO}" if name == coupled else ""
        error = gradient_error(losses[name])
        print(f"{name:<36}{1e3 * median:>9.1f}{median / base:>8.3f}{bound:>8}{error:>17.1e}", flush=True)


def peak_of(batch: list[tuple[Tensor, Tensor]]) -> int:
    """Return the peak of one window in bytes, without the batch itself."""
    engine = engine_of(bigbatch.Coupled(encode, loss_in_blocks))
    engine.backward(batch[:MICROBATCH])
    with AllocationTracker(torch.device("cpu")) as tracker:
        tracker.track([*engine.model.parameters(), *engine.model.buffers()], MemoryCategory.PARAMETERS)
        engine.backward(batch)
    return tracker.peak_bytes


def compare_memory(largest: int) -> None:
    """Print the peak of windows of more and more pairs."""
    print(f"\n{'batch, 32 at a time':<24}{'peak MiB':>10}{'features MiB':>14}{'ratio without':>15}{'bound':>8}")
    size, base = 2 * MICROBATCH, 0.0
    while size <= largest:
        peak = peak_of(samples(size))
        features = 2 * size * FEATURES * 4 * 2  # two towers, float32; the features and their gradients
        base = base or peak - features
        ratio = (peak - features) / base
        print(f"{size:<24,}{peak / 2**20:>10.2f}{features / 2**20:>14.2f}{ratio:>15.4f}{LARGEST_MEMORY:>8}", flush=True)
        size *= 4


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed windows of each kind")
    parser.add_argument("--threads", type=int, default=1, help="number of torch threads")
    parser.add_argument("--largest", type=int, default=4096, help="largest batch of the table of memory")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, CPU, {options.threads} thread(s)")
    compare_times(options.rounds)
    compare_memory(options.largest)


if __name__ == "__main__":
    main()
