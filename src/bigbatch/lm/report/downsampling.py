"""Many updates as few points that keep every spike: least, mean and greatest of so many updates in a row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_POINTS = 360  # about one for each two or three pixels of a chart


@dataclass(frozen=True)
class Points:
    """A line as it is drawn.

    Attributes:
        x: Of each point; the middle of what it stands for.
        mean: Of the finite values that it stands for; NaN where there is none.
        low: The least of them.
        high: The greatest.
        each: Updates that a point stands for, the last one maybe fewer; 1 where every update is drawn.
    """

    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    each: int

    @property
    def finite(self) -> list[float]:
        """Every least and greatest value."""
        return [value for value in (*self.low, *self.high) if math.isfinite(value)]


def reduced(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> Points:
    """Let each point stand for the same number of updates in a row, the fewest that leave at most ``most`` points.

    each = ⌈len / most⌉;  point i = min, mean, max of y[i·each : (i+1)·each], NaN left out
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
