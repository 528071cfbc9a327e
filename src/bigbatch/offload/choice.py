"""The choice among levels of offload and checkpointing modes: the fastest that fits on the card and on the host.

No torch, and no device is queried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bigbatch.errors import MemoryLimitError
from bigbatch.memory.limit import describe_bytes
from bigbatch.offload.costs import UpdateTime
from bigbatch.offload.levels import Offload


@dataclass(frozen=True)
class Candidate:
    """One way to run a window.

    Attributes:
        level: Of offload.
        checkpointing: Mode of activation checkpointing.
        size: Largest micro-batch, in tokens or samples.
        card_bytes: Peak on the card.
        host_bytes: Pinned, for one card.
        time: Predicted time.
    """

    level: Offload
    checkpointing: str
    size: int
    card_bytes: int
    host_bytes: int
    time: UpdateTime


def choose(candidates: Sequence[Candidate], *, card_bytes: int, host_bytes: int | None) -> Candidate:
    """Return the fastest candidate that fits; of equally fast ones, the first.

    Args:
        candidates: At least one; lower levels first.
        card_bytes: Memory of the card that tensors may use.
        host_bytes: Host memory that one card may use; None if unknown.

    Raises:
        MemoryLimitError: None fits.
    """
    on_card = [each for each in candidates if each.card_bytes <= card_bytes]
    if not on_card:
        least = min(candidates, key=lambda each: each.card_bytes)
        raise MemoryLimitError(
            f"no level of offload fits: the least, offload {least.level} with checkpointing {least.checkpointing}, "
            f"needs {describe_bytes(least.card_bytes)} on the card, and {describe_bytes(card_bytes)} are usable."
        )
    fitting = [each for each in on_card if host_bytes is None or each.host_bytes <= host_bytes]
    if not fitting:
        least = min(on_card, key=lambda each: each.host_bytes)
        raise MemoryLimitError(
            f"no level of offload fits: the least that fits on the card, offload {least.level}, needs "
            f"{describe_bytes(least.host_bytes)} of host memory, and {describe_bytes(host_bytes or 0)} are available."
        )
    return min(fitting, key=lambda each: each.time.total_s)


def describe_seconds(seconds: float) -> str:
    """Return the time of an update, such as "3.4 s" or "12 ms"."""
    return f"{1000 * seconds:.2g} ms" if seconds < 0.095 else f"{seconds:,.1f} s"
