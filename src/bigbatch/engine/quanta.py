"""Quanta of an engine with ``reproducible=True``: consecutive samples that are always computed together."""

from collections.abc import Sequence

from bigbatch.batching.plan import TokenBudget
from bigbatch.engine.microbatch_size import MicrobatchSize
from bigbatch.errors import MemoryLimitError


def check_quanta(quanta: Sequence[Sequence[int]], lengths: Sequence[int] | None, size: MicrobatchSize) -> None:
    """Check that no quantum is above the micro-batch that was requested or chosen.

    Args:
        quanta: The samples of each.
        lengths: Tokens of each sample; None if unknown.
        size: Of micro-batches.

    Raises:
        MemoryLimitError: The micro-batch that was chosen for the memory is below a quantum.
        ValueError: The micro-batch that was requested is.
    """
    for rows in quanta:
        if size.token_budget is None or lengths is None:
            amount, unit = len(rows), "samples"
        else:
            own = [lengths[row] for row in rows]
            amount, unit = (sum(own) if size.layout == "packed" else len(own) * max(own)), "tokens"
        if amount <= size.limit:
            continue
        what = f"samples {rows[0]} to {rows[-1]} of the batch are a quantum of {amount:,} {unit}"
        if size.requested == "auto":
            raise MemoryLimitError(
                f"{what}, and micro-batches of {size.limit:,} {unit} fit in memory: pass a smaller quantum."
            )
        budget = f"TokenBudget({size.requested.tokens})" if isinstance(size.requested, TokenBudget) else size.requested
        raise ValueError(f"{what}, above microbatch={budget}: pass a larger micro-batch, or a smaller quantum.")
