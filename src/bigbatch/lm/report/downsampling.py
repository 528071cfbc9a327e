"""Downsampling that keeps every spike: minimum, mean and maximum of consecutive updates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_POINTS = 360  # about one for each two or three pixels of a chart


@dataclass(frozen=True)
class Points:
    """The points of a drawn line.

    Attributes:
        x: Middle of the updates of each point.
        mean: Mean of their finite values; NaN without any.
        low: Their minimum.
        high: Their maximum.
        each: Updates per point (fewer for the last one); 1 if every update is drawn.
    """

    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    each: int

    @property
    def finite(self) -> list[float]:
        """All finite minima and maxima."""
        return [value for value in (*self.low, *self.high) if math.isfinite(value)]


def reduced(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> Points:
    """Combine the same number of consecutive updates into each point, as few as leave at most ``most`` points.

    each = ⌈len / most⌉;  point i = min, mean, max of y[i·each : (i+1)·each], NaN excluded
    """
    each = max(1, -(-len(y) // most))
    if each == 1:
        values = tuple(map(float, y))
        return Points(tuple(map(float, x)), values, values, values, 1)
    places, means, lows, highs = [], [], [], []
    for start in range(0, len(y), each):
        part = [value for value in y[start : start + each] if value == value]
        last = min(start + each, len(y)) - 1
        places.append((x[start] + x[last]) / 2)
        means.append(math.fsum(value / len(part) for value in part) if part else math.nan)
        lows.append(min(part, default=math.nan))
        highs.append(max(part, default=math.nan))
    return Points(tuple(places), tuple(means), tuple(lows), tuple(highs), each)
