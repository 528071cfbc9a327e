"""The table of levels of offload as lines of text, and as JSON values."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bigbatch.lm.text import plural
from bigbatch.memory.limit import describe_bytes
from bigbatch.offload.choice import describe_seconds

if TYPE_CHECKING:
    from bigbatch.lm.planning.offload_table import OffloadRow, OffloadTable

FASTEST = "◀ fastest"
HEADINGS = ("memory", "offload", "checkpointing", "micro-batch", "card", "host", "update")


def describe_table(table: "OffloadTable") -> Iterator[str]:
    """Yield the lines of a table: the run, a row for each candidate, and the rates that times are predicted from."""
    trained = "all trained" if table.num_trained == table.num_parameters else f"{table.num_trained:,} of them trained"
    yield f"{table.model}, {table.num_parameters:,} parameters, {trained}, {table.precision}"
    yield from table.notes
    each = "" if table.num_cards == 1 else f" on each of {table.num_cards} GPUs"
    host = "" if table.host_bytes is None else f"; {describe_bytes(table.host_bytes)} of host memory are available"
    yield f"first update: {plural(table.tokens, 'token')}{each}{host}"
    yield ""
    before = ""
    cells: list[tuple[str, ...]] = [HEADINGS]
    for row in table.rows:
        cells.append((row.memory.name if row.memory.name != before else "", *_cells(row, table)))
        before = row.memory.name
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    for line in cells:
        texts = [text.ljust(width) for text, width in zip(line[:3], widths[:3], strict=True)]
        numbers = [text.rjust(width) for text, width in zip(line[3:7], widths[3:], strict=True)]
        yield "  ".join([*texts, *numbers, *line[7:]]).rstrip()
    yield ""
    if table.obstacle is not None:
        yield table.obstacle
    which = "host: of all GPUs, pinned; " if table.num_cards > 1 else "host: pinned; "
    yield f"card: peak of an update; {which}micro-batch: in {table.unit}; update: predicted, with"
    yield from dict.fromkeys(f"  {row.memory.card}" for row in table.rows)


def _cells(row: "OffloadRow", table: "OffloadTable") -> tuple[str, ...]:
    found = row.candidate
    host = describe_bytes(found.host_bytes * table.num_cards) if found.host_bytes else "–"
    update = describe_seconds(found.time.total_s) if row.fits else "does not fit"
    mark = (FASTEST,) if row.is_chosen else () if row.is_supported else ("not in training",)
    return (found.level, found.checkpointing, f"{found.size:,}", describe_bytes(found.card_bytes), host, update, *mark)


def table_as_json(table: "OffloadTable") -> dict[str, Any]:
    """Convert a table to JSON values; bytes on the host are those of all GPUs."""
    return {
        "model": table.model,
        "precision": table.precision,
        "parameters": table.num_parameters,
        "trained_parameters": table.num_trained,
        "cards": table.num_cards,
        "tokens": table.tokens,
        "host_available_bytes": table.host_bytes,
        "microbatch_unit": table.unit,
        "rows": [
            {
                "memory": row.memory.name,
                "usable_bytes": row.memory.usable_bytes,
                "gpu": row.memory.card.name,
                "link_bytes_per_s": row.memory.card.link_rate,
                "link_is_measured": row.memory.card.link_is_measured,
                "offload": row.candidate.level,
                "checkpointing": row.candidate.checkpointing,
                "microbatch": row.candidate.size,
                "card_bytes": row.candidate.card_bytes,
                "host_bytes": row.candidate.host_bytes * table.num_cards,
                "update_s": row.candidate.time.total_s,
                "fits": row.fits,
                "supported": row.is_supported,
                "fastest": row.is_chosen,
            }
            for row in table.rows
        ],
        "obstacle": table.obstacle,
        "notes": list(table.notes),
    }
