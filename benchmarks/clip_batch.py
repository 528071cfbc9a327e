"""A CLIP update of 8,192 pairs within 8 GiB, compared with plain accumulation of the same micro-batches, on a GPU.

    python benchmarks/clip_batch.py [--pairs 8192] [--memory 8GiB] [--rounds 4] [--device cuda]

The model is `transformers.CLIPModel` with its default configuration (ViT-B/32 and a text transformer, 151 million
parameters), float32 weights and AdamW, bfloat16 autocast; images of 224 × 224 as uint8 and texts of 77 tokens, random,
in pinned host memory. The allocator is limited to ``--memory``: an update that needs more fails. The micro-batch is
chosen by ``microbatch="auto"``.

"plain accumulation" computes the loss of each micro-batch on its own, with the negatives of that micro-batch only: it
is the time to compare with, not the same update. Both run interleaved; ``ratio`` divides the medians. "whole batch"
differentiates all pairs at once, within the same limit. The error compares the gradient of one update of 512 pairs with
that of all 512 at once, in float32 without autocast, on the same device.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

import bigbatch
from bigbatch.memory.limit import describe_bytes, parse_memory
from bigbatch.memory.usage import free_cached_memory

LARGEST_RATIO = 1.45
LOSS = bigbatch.losses.clip(logit_scale=lambda model: model.logit_scale.exp())
ERROR_PAIRS = 512


def build(device: torch.device, *, tiny: bool) -> CLIPModel:
    """Return a newly initialized model; a tiny one for a test on a CPU."""
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = CLIPConfig(text_config=layers, vision_config=layers, projection_dim=32) if tiny else CLIPConfig()
    return CLIPModel(config).to(device)


def features_of(model: CLIPModel, pairs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the features of images and texts, [pairs, dim] each."""
    images = (pairs["image"].float() - 127.5) / 63.75
    vision = model.visual_projection(model.vision_model(pixel_values=images).pooler_output)
    return vision, model.text_projection(model.text_model(input_ids=pairs["text"]).pooler_output)


def encode(model: CLIPModel, pairs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """As `features_of` with bfloat16 autocast; features are float32."""
    with torch.autocast(pairs["text"].device.type, torch.bfloat16):
        left, right = features_of(model, pairs)
    return left.float(), right.float()


def of_microbatch(model: CLIPModel, pairs: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Return the loss of a micro-batch on its own: what plain accumulation sums up."""
    return LOSS(model, encode(model, pairs)) * len(pairs["text"]), len(pairs["text"])


def make_pairs(count: int, device: torch.device) -> dict[str, Tensor]:
    """Return random pairs on the host, pinned for a GPU."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 224, 224), dtype=torch.uint8, generator=generator)
    texts = torch.randint(1, 49_000, (count, 77), generator=generator)
    texts[:, -1] = 49_407  # the end token, whose hidden state is the feature
    pairs = {"image": images, "text": texts}
    return {name: values.pin_memory() for name, values in pairs.items()} if device.type == "cuda" else pairs


def gradient_error(device: torch.device, microbatch: int, *, tiny: bool) -> float:
    """Return the relative error of the gradient of a small batch, in float32."""
    model = build(device, tiny=tiny)
    pairs = make_pairs(ERROR_PAIRS if not tiny else 16, device)
    loss = bigbatch.Coupled(features_of, LOSS)
    bigbatch.Engine(model, None, loss, microbatch=microbatch, check=False).backward(pairs)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    LOSS(model, features_of(model, {name: values.to(device) for name, values in pairs.items()})).backward()
    expected = [p.grad for p in model.parameters()]
    difference = torch.nn.utils.get_total_norm([a - b for a, b in zip(found, expected, strict=True)])
    return (difference / torch.nn.utils.get_total_norm(expected)).item()


def timed(run: Callable[[Any], Any], pairs: dict[str, Tensor], device: torch.device) -> float:
    """Return the seconds of one update."""
    started_s = time.perf_counter()
    run(pairs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_s


def whole_batch(model: nn.Module, pairs: dict[str, Tensor], device: torch.device) -> str:
    """Differentiate all pairs at once; return what happened."""
    try:
        LOSS(model, encode(model, {name: values.to(device) for name, values in pairs.items()})).backward()
    except torch.OutOfMemoryError:
        return "out of memory"
    return "fits"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8192, help="pairs of one update")
    parser.add_argument("--memory", default="8GiB", help="limit of the allocator and of the choice of the micro-batch")
    parser.add_argument("--rounds", type=int, default=4, help="timed updates of each kind")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with a tiny model to test this script")
    options = parser.parse_args()
    device = torch.device(options.device)
    tiny, limit = device.type != "cuda", parse_memory(options.memory).to_bytes()
    name = platform.machine()
    if not tiny:
        device = torch.device("cuda", torch.cuda.current_device())
        name = torch.cuda.get_device_name(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(limit / total, device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {name}; limit {describe_bytes(limit)}")
    pairs = make_pairs(options.pairs, device)
    model = build(device, tiny=tiny)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    coupled = bigbatch.Engine(
        model, optimizer, bigbatch.Coupled(encode, LOSS), microbatch="auto", memory=options.memory, noise=False
    )
    started_s = time.perf_counter()
    coupled.step(pairs)
    print(f"first update, with the choice of the micro-batch: {time.perf_counter() - started_s:.1f} s")
    print(coupled.microbatch_size.choice)
    microbatch = coupled.microbatch_size.current
    plain = bigbatch.Engine(model, optimizer, of_microbatch, microbatch=microbatch, noise=False, check=False)
    plain.step(pairs)
    runs = {"plain accumulation": plain.step, "Coupled": coupled.step}
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks = dict.fromkeys(runs, 0)
    for turn in range(options.rounds):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            if not tiny:
                torch.cuda.reset_peak_memory_stats(device)
            times[name].append(timed(runs[name], pairs, device))
            peaks[name] = max(peaks[name], 0 if tiny else torch.cuda.max_memory_allocated(device))
    base = statistics.median(times["plain accumulation"])
    print(f"{options.pairs:,} pairs, {microbatch} at a time, model of {sum(p.numel() for p in model.parameters()):,}")
    print(f"{'':<22}{'s/update':>10}{'pairs/s':>10}{'ratio':>8}{'bound':>8}{'peak':>12}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        bound = f"{LARGEST_RATIO}" if name == "Coupled" else ""
        peak = describe_bytes(peaks[name])
        print(f"{name:<22}{median:>10.2f}{options.pairs / median:>10,.0f}{median / base:>8.3f}{bound:>8}{peak:>12}")
    print(f"whole batch at once within the limit: {whole_batch(model, pairs, device)}")
    del coupled, plain, model, optimizer, runs
    free_cached_memory()
    if not tiny:
        torch.cuda.set_per_process_memory_fraction(1.0, device)  # the whole batch at once needs more
    error = gradient_error(device, 32 if not tiny else 4, tiny=tiny)
    print(f"gradient of {ERROR_PAIRS} pairs, 32 at a time, against all at once, float32: error {error:.1e}")


if __name__ == "__main__":
    main()
