"""What ranks tell one another before a window, where they have to: how much each has, and that none has failed.

each rank's Opening and items of each term → numbers → gathered → the most micro-batches, the items over all ranks
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass

from bigbatch.distributed.gradient_sync import GradientSync
from bigbatch.distributed.window_vote import Number, name_ranks, terms_from_numbers, terms_to_numbers
from bigbatch.errors import RankFailedError
from bigbatch.types import Items


@dataclass(frozen=True)
class WindowStart:
    """What one rank brings to the next window.

    Attributes:
        failed: It cannot take part: its data or its settings raised.
        has_padding_microbatch: It has a micro-batch to run where the others have one more.
        num_microbatches: That it knows of.
    """

    failed: bool = False
    has_padding_microbatch: bool = False
    num_microbatches: int = 0


def agree_on_start(
    sync: GradientSync, own: WindowStart, totals: Mapping[str, Items] | None
) -> tuple[int, Mapping[str, Items] | None]:
    """Hear what all ranks bring to the next window. Collective, under several ranks.

    Args:
        sync: How the ranks reach one another.
        own: What this rank brings.
        totals: Items of each term on this rank; none of them where it has nothing and knows no names.

    Returns:
        The most micro-batches that any rank has, and the items of each term over all ranks.

    Raises:
        RankFailedError: Another rank failed before the window.
        ValueError: There are too many terms, or ranks have other ones than one another; or, of a sharded model, nothing
            to keep step with.
    """
    if sync.size == 1:
        return own.num_microbatches, totals
    try:
        values = _encode(own, totals or {})
    except ValueError:
        announce_failure(sync)
        raise
    rows = sync.all_gather(values)
    if failed := [rank for rank, row in enumerate(rows) if row[0]]:
        raise RankFailedError(
            f"{name_ranks(failed)} failed before the window, which therefore changes nothing on any rank: see what was "
            "said there."
        )
    most = int(max(row[2] for row in rows))
    if sync.runs_in_lockstep and most and (lacking := [rank for rank, row in enumerate(rows) if not row[1]]):
        raise ValueError(
            f"rank {lacking[0]} has had no micro-batch yet, and layers of a sharded model run on all ranks or on "
            "none: give every rank at least one sample in the first window."
        )
    return most, None if totals is None else _over_ranks(sync, totals, [row[3:] for row in rows])


def announce_failure(sync: GradientSync) -> None:
    """Let the other ranks know, who are in `agree` or on their way there. Collective."""
    with suppress(Exception):  # they may be gone
        sync.all_gather(_encode(WindowStart(failed=True), {}))


def _encode(own: WindowStart, totals: Mapping[str, Items]) -> list[Number]:
    return [*map(float, astuple(own)), *terms_to_numbers({name: (items, 0.0) for name, items in totals.items()})]


def _over_ranks(sync: GradientSync, totals: Mapping[str, Items], rows: list[list[float]]) -> dict[str, Items]:
    """Add up the items of each term; a rank that knows no names, for want of samples, learns them. Collective then."""
    over_ranks = [items for items, _ in terms_from_numbers(rows)]
    names = list(totals)
    if over_ranks and any(not row[0] for row in rows):
        source = next(rank for rank, row in enumerate(rows) if row[0])
        names = json.loads(sync.broadcast_text(json.dumps(names), source=source))
    by_name = dict(zip(sorted(names), over_ranks, strict=True))
    return {name: int(by_name[name]) if by_name[name].is_integer() else by_name[name] for name in names}
