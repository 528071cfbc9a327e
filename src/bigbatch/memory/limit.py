"""Memory limits: parsed from text, by the name of a GPU, or the free memory less a margin.

    "24GiB", "80%" → parse_memory → MemoryLimit.to_bytes(total_bytes)
    "a100-40gb"    → gpu_memory   → gpu_limit
    free, total    → default_limit

Integers, in bytes. No torch, and no device is queried.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from fractions import Fraction

KIB, MIB, GIB = 2**10, 2**20, 2**30

MARGIN_PERCENT = 2
MARGIN_BYTES = 256 * MIB
"""Margin of :func:`default_limit`: this percentage of the device's memory, and at least ``MARGIN_BYTES``."""

CONTEXT_BYTES = 512 * MIB
"""Approximate size of the CUDA context, allocated before any tensor: "non-PyTorch memory" in torch's messages."""

GPU_GIB = {
    "a100-40gb": 39.38,
    "a100-80gb": 79.14,
    "h100": 79.10,
    "h100-nvl": 93.00,
    "h200": 139.72,
    "b200": 178.35,
    "l4": 21.96,
    "l40s": 44.39,
    "a10g": 21.96,
    "a6000": 47.37,
    "t4": 14.56,
    "v100-16gb": 15.77,
    "v100-32gb": 31.73,
    "rtx-3060-12gb": 11.63,
    "rtx-3090": 23.55,
    "rtx-4080": 15.49,
    "rtx-4090": 23.52,
    "rtx-5090": 31.34,
    "mi250": 63.98,  # per die: each of its two dies is a device
    "mi300x": 191.69,
}
"""Memory of common GPUs in GiB, as torch's ``total_memory`` reports it; nominal, not measured here.

Each figure is the smallest in PyTorch's out-of-memory messages in public reports for the GPU on Linux ("GPU 0 has a
total capacity of 79.10 GiB"), with error correction on where it is the default. Other drivers report up to 1.5 % more.
"""

# Vendors, form factors and kinds of memory in the names that drivers print.
_IGNORED_WORDS = {
    *("", "nvidia", "geforce", "tesla", "amd", "instinct", "sxm", "sxm2", "sxm3", "sxm4", "sxm5", "sxm6", "pcie"),
    *("fhhl", "dgxs", "oam", "hbm2", "hbm2e", "hbm3", "hbm3e"),
}
_SAME_MODELS = {"v100s": "v100", "mi250x": "mi250"}

_LARGEST_BYTES = 2**63 - 1
_NUMBER = re.compile(r"(-?(?:\d{1,20}(?:\.\d{0,20})?|\.\d{1,20}))\s*(%|[a-z]*)", re.ASCII | re.IGNORECASE)
_UNITS = {"b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("i", 1024), ("ib", 1024), ("b", 1000))
}


@dataclass(frozen=True)
class MemoryLimit:
    """A memory limit: an amount in bytes, or a share of the device's memory.

    Attributes:
        text: The limit as requested; not compared by ``==``.
        amount_bytes: The amount; None for a share.
        share: Greater than 0 and at most 1; None for an amount.
    """

    text: str = field(compare=False)
    amount_bytes: int | None
    share: Fraction | None

    def __str__(self) -> str:
        return self.text

    def to_bytes(self, total_bytes: int | None = None) -> int:
        """Return the limit in bytes, a share rounded down.

        Args:
            total_bytes: Total memory of the device; None if unknown, as when planning for another machine.

        Raises:
            ValueError: An amount above ``total_bytes``, or a share of an unknown device.
        """
        if self.amount_bytes is None:
            assert self.share is not None, "a limit is an amount or a share"
            if total_bytes is None:
                raise ValueError(
                    f"memory {self.text} is a share of a device's memory, and no device is known: pass an amount such "
                    "as 24GiB, or the name of a GPU, such as --gpu a100-40gb."
                )
            return int(total_bytes * self.share)
        if total_bytes is not None and self.amount_bytes > total_bytes:
            largest = _format_rounded_down(total_bytes)
            raise ValueError(
                f"memory {self.text} is more than the {largest} that the device has: pass {largest} or less, or a "
                "share such as 90%."
            )
        return self.amount_bytes


def parse_memory(value: str | int) -> MemoryLimit:
    """Parse ``"24GiB"``, ``"24 G"`` (the same), ``"24GB"`` (24·10⁹ bytes), ``"80%"``, or an int, in bytes.

    Units are case-insensitive: B; KiB, Ki and K; KB; likewise for M, G and T. ``str(limit)`` parses to an equal limit.

    Raises:
        ValueError: Another format, not above zero, more than 100 % or more than 2⁶³ − 1 bytes; the message has the
            value and an example.
    """
    try:
        return read_memory(value)
    except ValueError as error:
        raise ValueError(f"memory is {value!r}: {error}.") from None


def read_memory(value: object) -> MemoryLimit:
    """Parse like :func:`parse_memory`, for callers that name the value themselves in the message.

    Raises:
        ValueError: The message continues ``NAME is VALUE:`` and has no full stop.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 < value < KIB:
            raise ValueError(f"a number without a unit is in bytes; pass text with a unit, such as '{value}GiB'")
        return _amount(Fraction(value), f"{value}B")
    match = _NUMBER.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or not isinstance(value, str):
        raise ValueError("it must be an amount such as 24GiB or a share such as 80%")
    number, unit = Fraction(match[1]), match[2].lower()
    if unit == "%":
        if number > 100:
            raise ValueError("a share must be at most 100%, such as 80%")
        if number > 0:
            return MemoryLimit(value, None, number / 100)
    elif number > 0 and unit not in _UNITS:
        problem = "its unit must be KiB, MiB, GiB, TiB or %" if unit else "it needs a unit"
        raise ValueError(f"{problem}, such as {match[1]}{'GiB' if number < MIB else 'B'}")
    return _amount(number * _UNITS.get(unit, 1), value)


def _amount(exact_bytes: Fraction, text: str) -> MemoryLimit:
    if exact_bytes <= 0:
        raise ValueError("it must be more than 0, such as 24GiB or 80%")
    if exact_bytes < 1:
        raise ValueError("it must be at least one byte, such as 24GiB")
    if exact_bytes > _LARGEST_BYTES:
        raise ValueError("it must be less than 8 EiB, such as 24GiB")
    return MemoryLimit(text, int(exact_bytes), None)


def known_gpu(name: str) -> str:
    """Return the key of a GPU in :data:`GPU_GIB`, from its key, a short name or the name that nvidia-smi prints.

        "NVIDIA A100-SXM4-80GB", "a100 80gb"  → a100-80gb        "NVIDIA H100 80GB HBM3" → h100
        "NVIDIA GeForce RTX 4090", "4090"     → rtx-4090         "a100" → a100-40gb: of several sizes, the smallest

    Raises:
        ValueError: The GPU is unknown. The message continues ``NAME is VALUE:`` and has no full stop.
    """
    words = [word for word in re.split(r"[\s_-]+", name.strip().lower()) if word not in _IGNORED_WORDS]
    sizes = [int(word.removesuffix("gb")) for word in words if re.fullmatch(r"\d{1,4}gb", word)]
    unsized = [word for word in words if not re.fullmatch(r"\d{1,4}gb", word)]
    model = "".join(_SAME_MODELS.get(word, word) for word in unsized)
    keys = {key.replace("-", ""): key for key in GPU_GIB}
    for spelling in ("".join(words), model, f"rtx{model}", model.removeprefix("rtx")) if len(sizes) < 2 else ():
        if spelling in keys and (not sizes or spelling == "".join(words)):
            return keys[spelling]
        of_model = [key for key in GPU_GIB if model and _without_size(key) in (spelling, f"{spelling}nvl")]
        # The reported memory is a few percent less than the size in the name.
        of_size = [key for key in of_model if not sizes or 0.9 * sizes[0] < GPU_GIB[key] < sizes[0]]
        if of_size:
            return min(of_size, key=GPU_GIB.__getitem__)
    family = [key for key in GPU_GIB if (unsized or [""])[0] in key.split("-")]
    near = difflib.get_close_matches(
        "-".join(words if family else unsized)[:60], family or GPU_GIB, n=2, cutoff=0.0 if family else 0.6
    )
    near.sort(key=list(GPU_GIB).index)
    if near:
        raise ValueError(f"it is not a known GPU; nearest {'is' if len(near) == 1 else 'are'} {' and '.join(near)}")
    raise ValueError("it is not a known GPU; pass its memory instead, such as 24GiB")


def _without_size(key: str) -> str:
    """Return the model of a GPU without hyphens and without its memory: a100 for a100-40gb."""
    return re.sub(r"-\d+gb$", "", key).replace("-", "")


def gpu_memory(name: str) -> int:
    """Return the total memory of a GPU in bytes, from :data:`GPU_GIB`.

    Raises:
        ValueError: The GPU is unknown; the message names the nearest.
    """
    try:
        return int(GPU_GIB[known_gpu(name)] * GIB)
    except ValueError as error:
        raise ValueError(f"gpu is {name!r}: {error}.") from None


def gpu_limit(name: str) -> int:
    """Return the default limit in bytes on an otherwise unused GPU.

        default_limit(free = total − CONTEXT_BYTES, total)

    Raises:
        ValueError: The GPU is unknown; the message names the nearest.
    """
    total_bytes = gpu_memory(name)
    return default_limit(total_bytes - CONTEXT_BYTES, total_bytes)


def default_limit(free_bytes: int, total_bytes: int) -> int:
    """Return the limit in bytes if none is set: the free memory less a margin, at least 0.

        free − max(2 % of total, 256 MiB)

    The margin covers memory that predictions do not count: fragmentation of the allocator's blocks, and later
    allocations by libraries (workspaces, communication buffers, kernels loaded on first use).

    Args:
        free_bytes: Free memory of the device now, after the context of this process was created.
        total_bytes: Total memory of the device.
    """
    return max(0, free_bytes - max(total_bytes * MARGIN_PERCENT // 100, MARGIN_BYTES))


def describe_bytes(num_bytes: int) -> str:
    """Format bytes in the largest unit of at least 1: ``23.4 GiB``, ``512.0 KiB``, ``17 B``."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if round(num_bytes / size * 1024, 1) >= 1024:  # it would be 1024.0 of the next smaller unit
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} B"


def _format_rounded_down(num_bytes: int) -> str:
    """Format bytes so that :func:`parse_memory` reads at most ``num_bytes``."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if num_bytes >= size:
            hundredths = num_bytes * 100 // size
            return f"{hundredths // 100}.{hundredths % 100:02}{unit}"
    return f"{num_bytes}B"
