"""What a micro-batch takes by its size, from a few that were timed."""

from bisect import bisect_left
from dataclasses import dataclass

from bigbatch.plan import Cost

MOST_OVERHEAD_TOKENS = 65_536


@dataclass(frozen=True)
class Timing:
    """Seconds of a micro-batch by its size, linear between those that were timed.

    Below the smallest, the line through the first two goes on; above the largest, that through the last two.

    Attributes:
        points: (size, seconds), sizes rising.
    """

    points: tuple[tuple[int, float], ...]

    def of(self, size: int) -> float:
        """Seconds of one micro-batch of a size."""
        sizes = [point for point, _ in self.points]
        place = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
        if place == 0:  # only one was timed
            return self.points[0][1] * size / sizes[0]
        (left, left_s), (right, right_s) = self.points[place - 1], self.points[place]
        slope = max(0.0, (right_s - left_s) / (right - left))
        seconds = left_s + slope * (size - left)
        return max(seconds, min(left_s, right_s) * size / right)

    @property
    def overhead_tokens(self) -> int:
        """How many tokens more one micro-batch could have for the time that another one costs to start."""
        (first, first_s), (last, last_s) = self.points[0], self.points[-1]
        if last == first:
            return 0
        slope = (last_s - first_s) / (last - first)
        if slope <= 0:
            return MOST_OVERHEAD_TOKENS
        return min(MOST_OVERHEAD_TOKENS, max(0, round(first_s / slope - first)))

    def cost(self) -> Cost:
        """The same as weights for `bigbatch.plan`; a pair of tokens keeps its share of a token."""
        usual = Cost()
        return Cost(self.overhead_tokens * usual.per_token, usual.per_token, usual.per_pair)
