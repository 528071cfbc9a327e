"""The contestants, their samples per micro-batch and their required packages. Does not import torch."""

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

OURS = "bigbatch"

SAMPLES: dict[str, int | None] = {
    OURS: None,
    "trainer": 1,
    "trainer-checkpointing": 4,
    "trainer-expert": 16,
    "accelerate": 1,
    "lightning": 1,
    "torchtitan": 2,
    "torchtitan-varlen": 2,
    "hand-written": 2,
    "hand-written-sdpa": 2,
}
"""Samples per micro-batch of every contestant, in the order of the table; None if it chooses them.

For torchtitan and the hand-written loops, rows of as many tokens as the longest sequence."""

ABOUT = {
    OURS: 'Engine(microbatch="auto"), set up as in bigbatch train',
    "trainer": "transformers Trainer with default options",
    "trainer-checkpointing": "transformers Trainer with activation checkpointing",
    "trainer-expert": "transformers Trainer with activation checkpointing, length grouping, Liger Kernel if available",
    "accelerate": "the accumulate loop of accelerate's documentation",
    "lightning": "Lightning's Trainer with accumulate_grad_batches",
    "torchtitan": "torchtitan's model, compiled layers and loss on full rows, which attend across documents",
    "torchtitan-varlen": "the same, with attention within documents, which are cut at the ends of rows",
    "hand-written": "a loop written for this model alone: packed documents, whole model compiled, bf16 weights",
    "hand-written-sdpa": "the same on full rows, which attend across documents",
}

NEEDS = {
    "trainer": ("accelerate",),
    "trainer-checkpointing": ("accelerate",),
    "trainer-expert": ("accelerate",),
    "accelerate": ("accelerate",),
    "lightning": ("lightning", "pytorch_lightning"),
    "torchtitan": ("torchtitan",),
    "torchtitan-varlen": ("torchtitan",),
}
"""Modules of a contestant, of which one must be installed."""

LIBRARIES = ("torch", "transformers", "accelerate", "lightning", "liger-kernel", "torchtitan", "flash-attn-4")
"""Distributions on which the measurements depend."""

TORCHTITAN = "torchtitan==0.2.2"  # later versions build models in another way

ALTERNATIVE_NAMES = {"lightning": "pytorch-lightning"}


class Entry(NamedTuple):
    """One row of the table: a contestant and its samples per micro-batch, None if it chooses them."""

    name: str
    samples: int | None


def default_entries() -> tuple[Entry, ...]:
    """Return every contestant with its default number of samples."""
    return tuple(Entry(name, samples) for name, samples in SAMPLES.items())


def read_entry(text: str) -> Entry:
    """Parse ``"trainer"``, or ``"trainer:4"`` for another number of samples.

    Raises:
        ValueError: The text is not an entry; the message continues ``NAME is VALUE:``, without the full stop.
    """
    name, colon, number = text.strip().partition(":")
    if name not in SAMPLES:
        *names, last = SAMPLES
        raise ValueError(f"it must be {', '.join(names)} or {last}")
    if not colon:
        return Entry(name, SAMPLES[name])
    if SAMPLES[name] is None:
        raise ValueError(f"{name} chooses its micro-batch; only the others accept a number of samples")
    if not re.fullmatch("[1-9][0-9]{0,7}", number):
        raise ValueError(f"after the colon comes a number of samples, such as {name}:4")
    return Entry(name, int(number))


def missing(name: str) -> str | None:
    """Return which package a contestant lacks; None if it can run."""
    modules = NEEDS.get(name, ())
    if not modules or any(importlib.util.find_spec(module) for module in modules):
        return None
    if modules == ("torchtitan",):
        return f"torchtitan is not installed: pip install {TORCHTITAN}"
    return f'{modules[0]} is not installed: pip install "bigbatch[bench]"'


def versions() -> dict[str, str | None]:
    """Return the versions of `LIBRARIES`; None for one that is not installed."""
    return {name: _version(name) or _version(ALTERNATIVE_NAMES.get(name, name)) for name in LIBRARIES}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
