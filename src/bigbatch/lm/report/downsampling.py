"""Downsampling that keeps every spike: minimum, mean and maximum of consecutive updates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
        same = tuple(map(float, y))
        return Points(tuple(map(float, x)), same, same, same, 1)
    values, starts = np.asarray(y, np.float64), np.arange(0, len(y), each)
    middles = np.asarray(x, np.float64)
    places = (middles[starts] + middles[np.minimum(starts + each, len(y)) - 1]) / 2
    is_value = ~np.isnan(values)
    counts = np.add.reduceat(is_value.astype(np.int64), starts)
    shares = np.where(is_value, values, 0.0) / np.repeat(np.maximum(counts, 1), each)[: len(y)]
    columns = (
        np.add.reduceat(shares, starts),
        np.minimum.reduceat(np.where(is_value, values, math.inf), starts),
        np.maximum.reduceat(np.where(is_value, values, -math.inf), starts),
    )
    means, lows, highs = (tuple(np.where(counts > 0, column, math.nan).tolist()) for column in columns)
    return Points(tuple(places.tolist()), means, lows, highs, each)
