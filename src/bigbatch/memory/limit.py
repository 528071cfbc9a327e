"""How much memory may be used: as a person writes it, by the name of a card, or what is free less a margin.

    "24GiB", "80%" → MemoryLimit → bytes_of(total)
    "a100-40gb"    → gpu_memory  → gpu_limit
    free, total    → default_limit

Integers, in bytes. No torch here, and no device is asked.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from fractions import Fraction

KIB, MIB, GIB = 2**10, 2**20, 2**30

MARGIN_PERCENT = 2
MARGIN_BYTES = 256 * MIB
"""What :func:`default_limit` leaves free: this share of the device, and at least so many bytes."""

CONTEXT_BYTES = 512 * MIB
"""What CUDA itself takes of a card before any tensor, about: the memory that is "not PyTorch's" in its messages."""

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
    "mi250": 63.98,  # one of its two dies, each a device of its own
    "mi300x": 191.69,
}
"""Memory of well-known cards in GiB, as torch's ``total_memory`` gives it; nominal, not measured here.

Each figure is the smallest that PyTorch's out-of-memory messages in public reports name for the card on Linux ("GPU 0
has a total capacity of 79.10 GiB"), error correction on where it is the default. Other drivers give up to 1.5 % more.
"""

_LARGEST_BYTES = 2**63 - 1
_NUMBER = re.compile(r"(-?(?:\d{1,20}(?:\.\d{0,20})?|\.\d{1,20}))\s*(%|[a-z]*)", re.ASCII | re.IGNORECASE)
_UNITS = {"b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("i", 1024), ("ib", 1024), ("b", 1000))
}


@dataclass(frozen=True)
class MemoryLimit:
    """Memory that may be used: an amount, or a share of whatever the device has.

    Attributes:
        text: How it was asked for; two limits that ask for the same are equal however they are written.
        amount_bytes: The amount; None for a share.
        share: More than 0 and at most 1; None for an amount.
    """

    text: str = field(compare=False)
    amount_bytes: int | None
    share: Fraction | None

    def __str__(self) -> str:
        return self.text

    def to_bytes(self, total_bytes: int | None = None) -> int:
        """Return the limit in bytes, a share rounded down.

        Args:
            total_bytes: All memory of the device; None where there is none, as in planning for another machine.

        Raises:
            ValueError: An amount that the device does not have, or a share of a device that is not known.
        """
        if self.amount_bytes is None:
            assert self.share is not None, "a limit is an amount or a share"
            if total_bytes is None:
                raise ValueError(
                    f"memory {self.text} is a share of a device's memory, and no device is known: pass an amount such "
                    "as 24GiB, or a card by its name, such as --gpu a100-40gb."
                )
            return int(total_bytes * self.share)
        if total_bytes is not None and self.amount_bytes > total_bytes:
            most = _rounded_down(total_bytes)
            raise ValueError(
                f"memory {self.text} is more than the {most} that the device has: pass {most} or less, or a share "
                "such as 90%."
            )
        return self.amount_bytes


def parse_memory(asked: str | int) -> MemoryLimit:
    """Understand ``"24GiB"``, ``"24 G"`` (the same), ``"24GB"`` (24·10⁹ bytes), ``"80%"``, or a number of bytes.

    Units count whether large or small: B; KiB, Ki and K; KB; and so on for M, G and T. ``str(limit)`` parses back to
    an equal limit.

    Raises:
        ValueError: Nothing of that, zero, less or more than all; the message has the value and an example.
    """
    try:
        return read_memory(asked)
    except ValueError as error:
        raise ValueError(f"memory is {asked!r}: {error}.") from None


def read_memory(asked: object) -> MemoryLimit:
    """Do what :func:`parse_memory` does, for callers with their own name for the value.

    Raises:
        ValueError: The message is what goes after ``NAME is VALUE:``, without the full stop.
    """
    if isinstance(asked, int) and not isinstance(asked, bool):
        if 0 < asked < KIB:
            raise ValueError(f"a number alone is in bytes; write text with a unit, such as '{asked}GiB'")
        return _amount(Fraction(asked), f"{asked}B")
    found = _NUMBER.fullmatch(asked.strip()) if isinstance(asked, str) else None
    if found is None or not isinstance(asked, str):
        raise ValueError("it must be an amount such as 24GiB or a share such as 80%")
    number, unit = Fraction(found[1]), found[2].lower()
    if unit == "%":
        if number > 100:
            raise ValueError("a share must be at most 100%, such as 80%")
        if number > 0:
            return MemoryLimit(asked, None, number / 100)
    elif number > 0 and unit not in _UNITS:
        problem = "its unit must be KiB, MiB, GiB, TiB or %" if unit else "it needs a unit"
        raise ValueError(f"{problem}, such as {found[1]}{'GiB' if number < MIB else 'B'}")
    return _amount(number * _UNITS.get(unit, 1), asked)


def _amount(exact_bytes: Fraction, text: str) -> MemoryLimit:
    if exact_bytes <= 0:
        raise ValueError("it must be more than 0, such as 24GiB or 80%")
    if exact_bytes < 1:
        raise ValueError("it must be at least one byte, such as 24GiB")
    if exact_bytes > _LARGEST_BYTES:
        raise ValueError("it is more than any machine has")
    return MemoryLimit(text, int(exact_bytes), None)


def known_gpu(name: str) -> str:
    """Return the name that :data:`GPU_GIB` has for a card; ``"NVIDIA GeForce RTX 4090"`` and ``"4090"`` count too.

    Raises:
        ValueError: None of them. The message is what goes after ``NAME is VALUE:``, without the full stop.
    """
    word = re.sub(r"[\s_-]+", "-", name.strip().lower())
    word = re.sub(r"^((nvidia|geforce|tesla|amd|instinct)-)+", "", word)
    bare = word.replace("-", "")
    names = {known.replace("-", ""): known for known in GPU_GIB}
    for spelling in (bare, f"rtx{bare}", bare.removeprefix("rtx")):
        if spelling in names:
            return names[spelling]
    family = [known for known in GPU_GIB if word.partition("-")[0] in known.split("-")]
    near = difflib.get_close_matches(word[:60], family or GPU_GIB, n=2, cutoff=0.0 if family else 0.6)
    near.sort(key=list(GPU_GIB).index)
    if near:
        raise ValueError(f"it is not a known card; nearest {'is' if len(near) == 1 else 'are'} {' and '.join(near)}")
    raise ValueError("it is not a known card; give its memory instead, such as 24GiB")


def gpu_memory(name: str) -> int:
    """Return all memory in bytes of the card ``name``, as nominal as :data:`GPU_GIB`.

    Raises:
        ValueError: No known card; the message names the nearest.
    """
    try:
        return int(GPU_GIB[known_gpu(name)] * GIB)
    except ValueError as error:
        raise ValueError(f"gpu is {name!r}: {error}.") from None


def gpu_limit(name: str) -> int:
    """Return in bytes what a run may use by default of a card ``name`` that nobody else uses.

        default_limit(free = total − CONTEXT_BYTES, total)

    Raises:
        ValueError: No known card; the message names the nearest.
    """
    total_bytes = gpu_memory(name)
    return default_limit(total_bytes - CONTEXT_BYTES, total_bytes)


def default_limit(free_bytes: int, total_bytes: int) -> int:
    """Return in bytes what a run may use where nobody said: what is free now, less a margin, never below 0.

        free − max(2 % of total, 256 MiB)

    The margin is for what no prediction counts: fragmentation of the allocator's blocks, and what libraries take later
    for themselves (workspaces, communication buffers, kernels loaded at first use).

    Args:
        free_bytes: Free on the device now, with the process's own context already there.
        total_bytes: All memory of the device.
    """
    return max(0, free_bytes - max(total_bytes * MARGIN_PERCENT // 100, MARGIN_BYTES))


def describe_bytes(num_bytes: int) -> str:
    """Write a number of bytes for people, in the largest unit that it fills: ``23.4 GiB``, ``512.0 KiB``, ``17 B``."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if round(num_bytes / size * 1024, 1) >= 1024:  # what would be shown as 1024.0 of the unit below
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} B"


def _rounded_down(num_bytes: int) -> str:
    """Write what :func:`parse_memory` reads as at most ``num_bytes``."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if num_bytes >= size:
            hundredths = num_bytes * 100 // size
            return f"{hundredths // 100}.{hundredths % 100:02}{unit}"
    return f"{num_bytes}B"
