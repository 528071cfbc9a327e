"""Which samples of a window run together: a plan under a token budget, and what is longer than the budget alone."""

from collections.abc import Sequence

from bigbatch.plan import Cost, plan

DEFAULT_COST = Cost()


def group_by_tokens(lengths: Sequence[int], size: int, *, cost: Cost = DEFAULT_COST) -> tuple[tuple[int, ...], ...]:
    """Group samples into micro-batches of at most so many tokens, padding included, the largest first.

    Args:
        lengths: Tokens of each sample.
        size: Tokens of a micro-batch. Samples that are longer come first, each alone: no size makes them smaller.
        cost: As for `bigbatch.plan`.

    Returns:
        The indices of the samples of each micro-batch.
    """
    longer = sorted((i for i, length in enumerate(lengths) if length > size), key=lambda i: (-lengths[i], i))
    if not longer:
        return plan(lengths, token_budget=size, cost=cost).microbatches[0]
    alone = tuple((i,) for i in longer)
    others = [i for i, length in enumerate(lengths) if length <= size]
    if not others:
        return alone
    groups = plan([lengths[i] for i in others], token_budget=size, cost=cost).microbatches[0]
    return alone + tuple(tuple(others[position] for position in group) for group in groups)
