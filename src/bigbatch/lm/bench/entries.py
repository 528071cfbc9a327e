"""Who takes part, with how many samples at a time, and what has to be installed for it. No torch here."""

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
}
"""The contestants, in the order of the table, and the samples of their micro-batches; None for one that chooses."""

ABOUT = {
    OURS: 'Engine(microbatch="auto"), arranged as bigbatch train does',
    "trainer": "transformers Trainer as it comes",
    "trainer-checkpointing": "transformers Trainer with activation checkpointing",
    "trainer-expert": "transformers Trainer with activation checkpointing, length grouping, Liger Kernel where it runs",
    "accelerate": "the accumulate loop of accelerate's documentation",
    "lightning": "Lightning's Trainer with accumulate_grad_batches",
}

NEEDS = {
    "trainer": ("accelerate",),
    "trainer-checkpointing": ("accelerate",),
    "trainer-expert": ("accelerate",),
    "accelerate": ("accelerate",),
    "lightning": ("lightning", "pytorch_lightning"),
}
"""Modules that a contestant runs on, any one of them."""

LIBRARIES = ("torch", "transformers", "accelerate", "lightning", "liger-kernel")
"""What the figures depend on, by the names of the distributions."""

ALSO_CALLED = {"lightning": "pytorch-lightning"}


class Entry(NamedTuple):
    """One row of the table: a contestant, and the samples of its micro-batches, None for one that chooses."""

    name: str
    samples: int | None


def default_entries() -> tuple[Entry, ...]:
    """Return every contestant with its own number of samples."""
    return tuple(Entry(name, samples) for name, samples in SAMPLES.items())


def read_entry(text: str) -> Entry:
    """Understand ``"trainer"``, or with other samples than its own ``"trainer:4"``.

    Raises:
        ValueError: The message is what goes after ``NAME is VALUE:``, without the full stop.

    """
    name, colon, number = text.strip().partition(":")
    if name not in SAMPLES:
        *names, last = SAMPLES
        raise ValueError(f"it must be {', '.join(names)} or {last}")
    if not colon:
        return Entry(name, SAMPLES[name])
    if SAMPLES[name] is None:
        raise ValueError(f"{name} chooses its micro-batch; only the others take a number of samples")
    if not re.fullmatch("[1-9][0-9]{0,7}", number):
        raise ValueError(f"after the colon comes a number of samples, such as {name}:4")
    return Entry(name, int(number))


def missing(name: str) -> str | None:
    """Say what a contestant lacks to take part; None if it lacks nothing."""
    modules = NEEDS.get(name, ())
    if not modules or any(importlib.util.find_spec(module) for module in modules):
        return None
    return f'{modules[0]} is not installed: pip install "bigbatch[bench]"'


def versions() -> dict[str, str | None]:
    """Return the versions of the libraries that the figures depend on; None for one that is not installed."""
    return {name: _version(name) or _version(ALSO_CALLED.get(name, name)) for name in LIBRARIES}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
