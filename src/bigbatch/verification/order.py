"""How far the gradient depends on the order and the cut of the micro-batches, compared with rounding of the batch.

random order of the samples → one micro-batch    → difference to the reference: rounding of the full batch itself
random order, random cut    → many micro-batches → difference to the reference: rounding of accumulation
"""

import random
from dataclasses import dataclass

from bigbatch.verification.cut_gradients import CutGradients, Gradients, relative_difference


@dataclass(frozen=True)
class OrderError:
    """Differences of the gradient that come from the order of the samples and the cut alone.

    Attributes:
        num_orders: Random orders that were tried, each with the full batch and with a random cut.
        relative_error: Largest ‖gradient − reference‖ / ‖reference‖ over the random orders and cuts.
        full_batch_error: The same for the full batch, or the largest part of it that fits, in these orders: what the
            full batch itself rounds.
    """

    num_orders: int
    relative_error: float
    full_batch_error: float

    def __str__(self) -> str:
        return (
            f"order: {self.num_orders} random orders and cuts differ by at most {self.relative_error:.1e}, the full "
            f"batch in these orders by {self.full_batch_error:.1e}"
        )

    def explain(self, tolerance: float) -> str:
        """Return the line of a verification: with a remark if the differences are more than rounding."""
        if max(self.relative_error, self.full_batch_error) <= tolerance:
            return str(self)
        return f"{self}: more than rounding, as by random numbers (dropout) that are drawn in another order"


def order_error(cut_gradients: CutGradients, reference: Gradients, *, num_orders: int, largest: int) -> OrderError:
    """Compare gradients of random orders and cuts with the reference.

    Args:
        cut_gradients: Of the batch.
        reference: Its gradient in the given order.
        num_orders: At least 1.
        largest: Samples of the largest micro-batch that fits.
    """
    generator = random.Random(0)
    num_samples = cut_gradients.samples.num_samples
    cut_error, full_batch_error = 0.0, 0.0
    for _ in range(num_orders):
        samples = generator.sample(range(num_samples), num_samples)
        whole = [samples[start : start + largest] for start in range(0, num_samples, largest)]
        full_batch_error = max(full_batch_error, relative_difference(cut_gradients.gradient(whole), reference))
        cut = _random_cut(samples, generator, largest=largest)
        cut_error = max(cut_error, relative_difference(cut_gradients.gradient(cut), reference))
    return OrderError(num_orders, cut_error, full_batch_error)


def _random_cut(samples: list[int], generator: random.Random, *, largest: int) -> list[list[int]]:
    """Cut samples into at least two micro-batches of random sizes; of at least two samples if there are four."""
    smallest = 2 if len(samples) >= 4 and largest >= 4 else 1  # some layers do not support a single sample
    most = max(smallest, min(largest, len(samples) // 2))
    parts, start = [], 0
    while start < len(samples):
        left = len(samples) - start
        size = generator.randint(smallest, most)
        size = left if left < 2 * smallest or (left - size < smallest and left <= largest) else size
        parts.append(samples[start : start + size])
        start += size
    return parts
