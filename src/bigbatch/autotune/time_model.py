"""Time of a micro-batch as a function of its size, interpolated from a few measurements."""

from bisect import bisect_left
from dataclasses import dataclass

from bigbatch.batching.plan import Cost

MAX_OVERHEAD_TOKENS = 65_536  # if the time does not increase with the size


@dataclass(frozen=True)
class TimeModel:
    """Seconds of a micro-batch by its size, piecewise linear between measurements.

    Below the smallest size the line through the first two is extrapolated, but not below a proportional time; above the
    largest size the line through the last two. A negative slope extrapolates as zero.

    Attributes:
        points: ``(size, seconds)``, sizes ascending.
    """

    points: tuple[tuple[int, float], ...]

    def of(self, size: int) -> float:
        """Return the seconds of one micro-batch of a size."""
        sizes = [point for point, _ in self.points]
        place = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
        if place == 0:  # only one measurement
            return self.points[0][1] * size / sizes[0]
        (left, left_s), (right, right_s) = self.points[place - 1], self.points[place]
        if left <= size <= right:
            share = (size - left) / (right - left)
            return (1 - share) * left_s + share * right_s
        slope = max(0.0, (right_s - left_s) / (right - left))
        near, near_s = (left, left_s) if size < left else (right, right_s)
        return max(near_s + slope * (size - near), near_s * min(1.0, size / near))

    def overhead_tokens(self, size: int) -> int:
        """Return the fixed time of a micro-batch in tokens: how many more could run in the time of its overhead.

        The intercept divided by the slope of the line through the smallest measurement and the one nearest to
        ``size``. Larger sizes are ignored: they may miss caches and need more time per token.
        """
        (first, first_s), *others = self.points
        if not others:
            return 0
        last, last_s = min(others, key=lambda point: abs(point[0] - size))
        slope = (last_s - first_s) / (last - first)
        if slope <= 0:
            return MAX_OVERHEAD_TOKENS
        return min(MAX_OVERHEAD_TOKENS, max(0, round(first_s / slope - first)))

    def cost(self, size: int) -> Cost:
        """Return the cost model for `bigbatch.plan`: the measured overhead, and default costs of tokens and pairs."""
        default = Cost()
        return Cost(self.overhead_tokens(size) * default.per_token, default.per_token, default.per_pair)
