"""All-gather before a window: micro-batches of each rank, item totals, and whether any rank failed."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass

from bigbatch.distributed.collective import Number, list_ranks
from bigbatch.distributed.gradient_sync import GradientSync
from bigbatch.distributed.window_vote import terms_from_numbers, terms_to_numbers
from bigbatch.errors import RankFailedError
from bigbatch.gradients.loss_checks import as_totals
from bigbatch.types import Items


@dataclass(frozen=True)
class WindowStart:
    """What one rank reports before a window.

    Attributes:
        failed: It cannot take part: its data or its settings raised an error.
        lacks_padding: It has no micro-batch to run if other ranks have more of them than it.
        num_microbatches: Its micro-batches, as far as they are known.
    """

    failed: bool = False
    lacks_padding: bool = False
    num_microbatches: int = 0


def agree_on_start(
    sync: GradientSync, num_microbatches: int, totals: Mapping[str, Items] | None
) -> tuple[int, Mapping[str, Items] | None]:
    """Exchange what the ranks have in the next window. Collective, except in a single process.

    Args:
        sync: Of the model.
        num_microbatches: On this rank.
        totals: Items of each term on this rank; empty if it has no samples and does not know the names.

    Returns:
        The largest number of micro-batches on any rank, and the global items of each term.

    Raises:
        RankFailedError: Another rank failed before the window.
        ValueError: The ranks have different terms or too many of them; or a rank that must run as many
            micro-batches as the others has had none so far.
    """
    if sync.size == 1:
        return num_microbatches, totals
    own = WindowStart(False, sync.needs_padding_microbatch, num_microbatches)
    try:
        values = _to_numbers(own, {} if totals is None else as_totals(totals))
    except (TypeError, ValueError):
        announce_failure(sync)
        raise
    rows = sync.all_gather(values)
    if failed := [rank for rank, row in enumerate(rows) if row[0]]:
        raise RankFailedError(
            f"{list_ranks(failed)} failed before the window, which therefore changes nothing on any rank: see the "
            "error there."
        )
    most = int(max(row[2] for row in rows))
    if most and (lacking := [rank for rank, row in enumerate(rows) if row[1]]):
        raise ValueError(
            f"rank {lacking[0]} has had no micro-batch so far, and {_why_all_run(sync)}: pass at least one sample to "
            "every rank in the first window."
        )
    return most, None if totals is None else _sum_over_ranks(sync, totals, [row[3:] for row in rows])


def announce_failure(sync: GradientSync) -> None:
    """Report to the ranks in `agree_on_start` that this one failed. Collective."""
    sync.all_gather(_to_numbers(WindowStart(failed=True), {}))


def _why_all_run(sync: GradientSync) -> str:
    if sync.is_sharded:
        return "the layers of a sharded model run on all ranks or on none"
    return "with lockstep=True a loss is computed on all ranks or on none"


def _to_numbers(own: WindowStart, totals: Mapping[str, Items]) -> list[Number]:
    return [*map(float, astuple(own)), *terms_to_numbers({name: (items, 0.0) for name, items in totals.items()})]


def _sum_over_ranks(sync: GradientSync, totals: Mapping[str, Items], rows: list[list[float]]) -> dict[str, Items]:
    """Add up the items of each term; a rank without samples receives the names. Collective in that case."""
    over_ranks = [items for items, _ in terms_from_numbers(rows)]
    names = list(totals)
    if over_ranks and any(not row[0] for row in rows):
        source = next(rank for rank, row in enumerate(rows) if row[0])
        names = sync.ranks.broadcast(names, source=source)
    by_name = dict(zip(sorted(names), over_ranks, strict=True))
    return {name: int(by_name[name]) if by_name[name].is_integer() else by_name[name] for name in names}
