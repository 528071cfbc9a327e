"""Grouping of a window's samples under a token budget; samples above the budget run alone.

Packed rows are padded to a few sizes, those of `round_up_row` and `round_down_row`, which bounds the number of kernels
that are compiled and CUDA graphs that are captured.
"""

from collections.abc import Sequence

from bigbatch.batching.plan import Cost, plan
from bigbatch.types import Layout

DEFAULT_COST = Cost()
SIZES_PER_DOUBLING = 8
MIN_ROW_STEP = 64  # smallest difference in tokens between two sizes


def group_by_tokens(
    lengths: Sequence[int], size: int, *, cost: Cost = DEFAULT_COST, layout: Layout = "padded"
) -> tuple[tuple[int, ...], ...]:
    """Group samples into micro-batches of at most ``size`` tokens, padding included, the largest first.

    Args:
        lengths: Tokens of each sample.
        size: Tokens of a micro-batch. Longer samples come first, each in a micro-batch of its own.
        cost: As for `bigbatch.plan`.
        layout: As for `bigbatch.plan`.

    Returns:
        The sample indices of each micro-batch.
    """
    longer = sorted((i for i, length in enumerate(lengths) if length > size), key=lambda i: (-lengths[i], i))
    if not longer:
        return plan(lengths, token_budget=size, cost=cost, layout=layout).microbatches[0]
    alone = tuple((i,) for i in longer)
    others = [i for i, length in enumerate(lengths) if length <= size]
    if not others:
        return alone
    groups = plan([lengths[i] for i in others], token_budget=size, cost=cost, layout=layout).microbatches[0]
    return alone + tuple(tuple(others[position] for position in group) for group in groups)


def round_up_row(tokens: int) -> int:
    """Return the smallest row size that holds ``tokens``: a multiple of an eighth of the power of two below.

    Sizes are 1,024, 1,152, …, 2,048, 2,304, …, 4,096, 4,608, …, and multiples of 64 below 512. A row filled to a budget
    of such a size has no padding; the last row of a window has less than an eighth.
    """
    step = _step(tokens)
    return -(-tokens // step) * step


def round_down_row(tokens: int) -> int:
    """Return the largest row size of at most ``tokens``; below 64, ``tokens`` itself."""
    step = _step(tokens)
    return tokens // step * step or tokens


def _step(tokens: int) -> int:
    return max(MIN_ROW_STEP, (1 << (max(1, tokens).bit_length() - 1)) // SIZES_PER_DOUBLING)
