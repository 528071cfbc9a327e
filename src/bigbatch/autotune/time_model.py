"""What a micro-batch takes by its size, from a few that were timed."""

from bisect import bisect_left
from dataclasses import dataclass

from bigbatch.batching.plan import Cost

MAX_OVERHEAD_TOKENS = 65_536


@dataclass(frozen=True)
class TimeModel:
    """Seconds of a micro-batch by its size, linear between those that were timed.

    Below the smallest, the line through the first two goes on, though never to nothing; above the largest, that through
    the last two. Where the larger of two was faster, they count as equally fast beyond.

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
        if left <= size <= right:
            share = (size - left) / (right - left)
            return (1 - share) * left_s + share * right_s
        slope = max(0.0, (right_s - left_s) / (right - left))
        near, near_s = (left, left_s) if size < left else (right, right_s)
        return max(near_s + slope * (size - near), near_s * min(1.0, size / near))

    def overhead_tokens(self, size: int) -> int:
        """How many tokens a micro-batch of about a size could have more for the time that another one costs to start.

        From the smallest that was timed and the one nearest to ``size``: what is larger may miss the caches, and take
        longer for each token.
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
        """The same as weights for `bigbatch.plan`; a pair of tokens keeps its share of a token."""
        usual = Cost()
        return Cost(self.overhead_tokens(size) * usual.per_token, usual.per_token, usual.per_pair)
