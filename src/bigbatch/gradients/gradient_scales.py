"""Scales of fixed-point gradient sums: one power of two for each parameter, from the magnitudes of recent windows.

magnitudes of recent windows → exponents → window → its own magnitudes → do the exponents suffice? → next window

Everything is integers that do not depend on the order of the quanta or on the number of ranks.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SUM_BITS = 62  # of an int64 sum: its sign and one spare bit are left
HEADROOM_BITS = 3  # gradients may grow 8 times in a window, or windows may have 8 times as many quanta
RESOLUTION_BITS = 35  # the error of a sum, relative to the largest gradient of a quantum, is at most 2 to minus 34
NUM_WINDOWS = 4  # whose magnitudes are kept
LARGEST_EXPONENT = 126  # 2 to this and its inverse are float32 numbers


@dataclass(frozen=True)
class Magnitudes:
    """The magnitudes of the gradients of one window, over all ranks.

    Attributes:
        exponents: For each parameter the smallest e with |g| < 2**e for all elements of all quanta; None if all are 0.
        num_quanta: Quanta of the window.
    """

    exponents: tuple[int | None, ...]
    num_quanta: int

    @classmethod
    def from_peaks(cls, peaks: Sequence[float], num_quanta: int) -> "Magnitudes":
        """Return the magnitudes of the largest absolute elements, which are finite."""
        return cls(tuple(math.frexp(peak)[1] if peak else None for peak in peaks), num_quanta)

    @property
    def count_bits(self) -> int:
        """Bits by which a sum of all quanta may be larger than one of them."""
        return max(self.num_quanta - 1, 0).bit_length()

    def scales(self) -> list[int]:
        """Return s for each parameter, whose sums are ∑ trunc(g · 2**s): as fine as the headroom permits."""
        largest = max((exponent for exponent in self.exponents if exponent is not None), default=0)
        headroom = min(HEADROOM_BITS, max(0, SUM_BITS - RESOLUTION_BITS - 2 * self.count_bits))
        base = SUM_BITS - headroom - self.count_bits
        return [_clamped(base - (largest if exponent is None else exponent)) for exponent in self.exponents]

    def suit(self, scales: Sequence[int]) -> bool:
        """Return whether sums with these scales neither overflow nor lose more than `RESOLUTION_BITS` permits."""
        resolution = min(RESOLUTION_BITS, SUM_BITS - 2 * self.count_bits)
        for exponent, scale in zip(self.exponents, scales, strict=True):
            if exponent is None:
                continue
            if exponent + self.count_bits + scale > SUM_BITS:
                return False
            if scale < _clamped(self.count_bits + resolution - exponent):
                return False
        return True


class GradientScales:
    """The magnitudes of recent windows, and the scales that follow from them; its state is plain values."""

    def __init__(self) -> None:
        self._recent: deque[Magnitudes] = deque(maxlen=NUM_WINDOWS)

    def scales(self, num_parameters: int) -> list[int] | None:
        """Return the scales of the next window; None if no window with these parameters is known."""
        recent = [each for each in self._recent if len(each.exponents) == num_parameters]
        if not recent:
            return None
        columns = zip(*(each.exponents for each in recent), strict=True)
        largest = tuple(max((e for e in column if e is not None), default=None) for column in columns)
        return Magnitudes(largest, max(each.num_quanta for each in recent)).scales()

    def note(self, magnitudes: Magnitudes) -> None:
        """Add the magnitudes of a window that ended; a window without a gradient adds nothing."""
        if any(exponent is not None for exponent in magnitudes.exponents):
            self._recent.append(magnitudes)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the magnitudes of recent windows as plain values."""
        return [{"exponents": list(each.exponents), "num_quanta": each.num_quanta} for each in self._recent]

    @staticmethod
    def check_state_dict(state: Any) -> None:
        """Raise ValueError if `load_state_dict` does not accept a state."""
        if not isinstance(state, list | tuple) or not all(map(_is_window, state)):
            raise ValueError(
                "the gradient scales of the state are damaged: they are a list of windows, each with exponents and "
                "num_quanta. Use those of state_dict()."
            )

    def load_state_dict(self, state: Any) -> None:
        """Continue with the magnitudes of `state_dict`.

        Raises:
            ValueError: As for `check_state_dict`; nothing is changed then.
        """
        self.check_state_dict(state)
        self._recent = deque(
            (Magnitudes(tuple(each["exponents"]), each["num_quanta"]) for each in state), maxlen=NUM_WINDOWS
        )


def _clamped(scale: int) -> int:
    return max(-LARGEST_EXPONENT, min(LARGEST_EXPONENT, scale))


def _is_window(value: Any) -> bool:
    if not isinstance(value, Mapping) or value.keys() != {"exponents", "num_quanta"}:
        return False
    exponents, num_quanta = value["exponents"], value["num_quanta"]
    if type(num_quanta) is not int or num_quanta < 1 or not isinstance(exponents, list | tuple):
        return False
    return all(exponent is None or (type(exponent) is int and abs(exponent) < 200) for exponent in exponents)
