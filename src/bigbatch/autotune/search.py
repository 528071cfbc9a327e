"""The largest size that fits, from few peaks: each of them may take a second."""

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from typing import TypeAlias

RESOLUTION = 50  # a share of the size: where the search ends
MAX_GUESSES = 12

_PeakOf: TypeAlias = Callable[[int], float]


def largest_below(peak_of: _PeakOf, least: int, most: int, usable_bytes: int) -> int:
    """Find the largest size from ``least``, which fits, to ``most`` whose peak is at most ``usable_bytes``.

    The peak is a maximum of lines over the sizes. Where the limit is reached on a line that two known sizes lie on, it
    leads there; where it is not, halving brings them closer. Ends within 2 % of the size, or after 14 peaks.
    """
    peak_of = cache(peak_of)
    if peak_of(most) <= usable_bytes:
        return most
    fitting, failing = [least], [most]  # the last of each is the nearest
    for guess in islice(_guesses(peak_of, fitting, failing, usable_bytes), MAX_GUESSES):
        low, high = fitting[-1], failing[-1]
        beyond = _intersect(peak_of, fitting[-2:], usable_bytes)  # nothing fits there: the peak rises ever faster
        if high - low <= _step_of(low) or beyond - low < _step_of(low):
            break
        middle = min(max(guess, low + 1), high - 1)
        (fitting if peak_of(middle) <= usable_bytes else failing).append(middle)
    return fitting[-1]


def _guesses(peak_of: _PeakOf, fitting: list[int], failing: list[int], usable_bytes: int) -> Iterator[int]:
    """Follow a line and look whether it led there, halve, and so on; the lists grow in between."""
    while True:
        ahead = _extrapolate(peak_of, fitting, failing, usable_bytes)
        if ahead is not None:
            yield ahead
            low, high = fitting[-1], failing[-1]
            yield low + _step_of(low) if low == ahead else high - _step_of(low)
        yield math.isqrt(fitting[-1] * failing[-1])


def _extrapolate(peak_of: _PeakOf, fitting: list[int], failing: list[int], usable_bytes: int) -> int | None:
    """Give where a line leads: that of the two smallest that fail, else that across the limit; None if nowhere new."""
    low, high = fitting[-1], failing[-1]
    if (ahead := _intersect(peak_of, failing[-2:], usable_bytes)) < high:  # nothing fits there, or just so
        return max(int(ahead), low + _step_of(low))
    if low + _step_of(low) <= (ahead := _intersect(peak_of, [low, high], usable_bytes)) < high:
        return int(ahead)
    return None


def _intersect(peak_of: _PeakOf, sizes: list[int], usable_bytes: int) -> float:
    """Give the size at which the line through two sizes reaches the limit; infinity where it does not."""
    if len(sizes) < 2:
        return math.inf
    (left, left_bytes), (right, right_bytes) = sorted((size, peak_of(size)) for size in sizes)
    if not left_bytes < right_bytes < math.inf:
        return math.inf
    return left + (usable_bytes - left_bytes) * (right - left) / (right_bytes - left_bytes)


def _step_of(size: int) -> int:
    return max(1, size // RESOLUTION)
