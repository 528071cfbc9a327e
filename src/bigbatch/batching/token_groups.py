"""Which samples of a window run together: a plan under a token budget, and what is longer than the budget alone.

Packed rows come in few sizes, so that kernels are made and recorded for few: those of `round_up_row` and
`round_down_row`.
"""

from collections.abc import Sequence

from bigbatch.batching.plan import Cost, plan
from bigbatch.types import Layout

DEFAULT_COST = Cost()
SIZES_A_DOUBLING = 8
MIN_ROW_STEP = 64  # tokens between two sizes, at least


def group_by_tokens(
    lengths: Sequence[int], size: int, *, cost: Cost = DEFAULT_COST, layout: Layout = "padded"
) -> tuple[tuple[int, ...], ...]:
    """Group samples into micro-batches of at most so many tokens, padding included, the largest first.

    Args:
        lengths: Tokens of each sample.
        size: Tokens of a micro-batch. Samples that are longer come first, each alone: no size makes them smaller.
        cost: As for `bigbatch.plan`.
        layout: As for `bigbatch.plan`.

    Returns:
        The indices of the samples of each micro-batch.
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
    """Give the size of a packed row that holds so many tokens: multiples of an eighth of the power of two below.

    1,024, 1,152, …, 2,048, 2,304, …, 4,096, 4,608, … and below 512 the multiples of 64. The row that a budget of such a
    size fills has no filling; the last of a window has less than an eighth.
    """
    step = _step(tokens)
    return -(-tokens // step) * step


def round_down_row(tokens: int) -> int:
    """Give the largest size of a packed row that is at most so many tokens; the tokens themselves below 64."""
    step = _step(tokens)
    return tokens // step * step or tokens


def _step(tokens: int) -> int:
    return max(MIN_ROW_STEP, (1 << (max(1, tokens).bit_length() - 1)) // SIZES_A_DOUBLING)
