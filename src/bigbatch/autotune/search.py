"""Find the largest size that fits with few evaluations of its peak, which may take a second each; list sizes below."""

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from typing import TypeAlias

RESOLUTION = 50  # the search ends within size / RESOLUTION
MAX_GUESSES = 12
SIZES_PER_DOUBLING = 4  # sizes compared by the time model

_PeakOf: TypeAlias = Callable[[int], float]


def largest_below(peak_of: _PeakOf, low: int, high: int, usable_bytes: int) -> int:
    """Return the largest size from ``low`` to ``high`` whose peak is at most ``usable_bytes``.

    The peak is assumed to be convex and piecewise linear in the size: a maximum of lines. Secants through known sizes
    hit the limit exactly if both lie on the line that crosses it; bisection (geometric) brings them closer otherwise.
    Ends within 2 % of the size, or after 14 evaluations.

    Args:
        peak_of: Peak of a size, in bytes; infinity if it does not fit.
        low: A size that fits.
        high: The largest size to consider.
        usable_bytes: The limit.
    """
    peak_of = cache(peak_of)
    if peak_of(high) <= usable_bytes:
        return high
    fitting, failing = [low], [high]  # the last of each is the nearest
    for guess in islice(_guesses(peak_of, fitting, failing, usable_bytes), MAX_GUESSES):
        low, high = fitting[-1], failing[-1]
        beyond = _intersect(peak_of, fitting[-2:], usable_bytes)  # an upper bound: the peak is convex
        if high - low <= _step_of(low) or beyond - low < _step_of(low):
            break
        middle = min(max(guess, low + 1), high - 1)
        (fitting if peak_of(middle) <= usable_bytes else failing).append(middle)
    return fitting[-1]


def _guesses(peak_of: _PeakOf, fitting: list[int], failing: list[int], usable_bytes: int) -> Iterator[int]:
    """Yield the size at a secant, one next to it to confirm, then a bisection; the caller extends the lists."""
    while True:
        secant_size = _extrapolate(peak_of, fitting, failing, usable_bytes)
        if secant_size is not None:
            yield secant_size
            low, high = fitting[-1], failing[-1]
            yield low + _step_of(low) if low == secant_size else high - _step_of(low)
        yield math.isqrt(fitting[-1] * failing[-1])


def _extrapolate(peak_of: _PeakOf, fitting: list[int], failing: list[int], usable_bytes: int) -> int | None:
    """Return where a secant reaches the limit: of the two smallest failing sizes, else across it; None if not new."""
    low, high = fitting[-1], failing[-1]
    if (size := _intersect(peak_of, failing[-2:], usable_bytes)) < high:  # an upper bound of the sizes that fit
        return max(int(size), low + _step_of(low))
    if low + _step_of(low) <= (size := _intersect(peak_of, [low, high], usable_bytes)) < high:
        return int(size)
    return None


def _intersect(peak_of: _PeakOf, sizes: list[int], usable_bytes: int) -> float:
    """Return the size at which the line through two sizes reaches the limit; infinity if it does not."""
    if len(sizes) < 2:
        return math.inf
    (left, left_bytes), (right, right_bytes) = sorted((size, peak_of(size)) for size in sizes)
    if not left_bytes < right_bytes < math.inf:
        return math.inf
    return left + (usable_bytes - left_bytes) * (right - left) / (right_bytes - left_bytes)


def _step_of(size: int) -> int:
    return max(1, size // RESOLUTION)


def sizes_between(smallest: int, largest: int) -> list[int]:
    """Return sizes from the smallest to the largest, `SIZES_PER_DOUBLING` in each doubling."""
    sizes = [smallest]
    while sizes[-1] < largest:
        sizes.append(min(largest, max(sizes[-1] + 1, round(sizes[-1] * 2 ** (1 / SIZES_PER_DOUBLING)))))
    return sizes
