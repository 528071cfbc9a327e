"""``bigbatch plan``: memory, micro-batches and time of a run before training, as text or one JSON object."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bigbatch.cli.console import duration, make_console, progress_display, quiet_libraries
from bigbatch.cli.offload_table import describe_table, table_as_json
from bigbatch.cli.options import PlanOptions
from bigbatch.cli.run_lookup import check_paths
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.text import plural
from bigbatch.memory.limit import describe_bytes

if TYPE_CHECKING:
    from bigbatch.batching.plan import Plan
    from bigbatch.lm.planning.forecast import Forecast
    from bigbatch.memory.usage import MemoryBudget

FITS = 0
DOES_NOT_FIT = 1
DRAWING_COLUMNS = 80  # of the drawing of a plan
MOST_ROWS = 8  # first and last micro-batches that a narrow terminal shows


def run(config: TrainConfig, options: PlanOptions) -> int:
    """Print the forecast, or the table of levels of offload; return 1 only if nothing fits in memory."""
    check_paths(config)
    if config.offload != "none" or options.cards > 1:
        return _print_table(config, options)
    if options.host_memory is not None:
        raise InputError("--host-memory is for --offload: add --offload auto, or leave it out.")
    console, notes = make_console(), make_console(stderr=True)
    with progress_display(console if not options.as_json else notes if notes.is_terminal else None) as progress:
        from bigbatch.lm.planning.forecast import forecast

        quiet_libraries()
        result = forecast(config, progress=progress)
    if options.as_json:
        console.print_unbroken(json.dumps(as_json(result)))
    else:
        for line in describe(result, width=console.width if console.is_terminal else DRAWING_COLUMNS):
            console.print(line)
    return DOES_NOT_FIT if result.fits is False else FITS


def _print_table(config: TrainConfig, options: PlanOptions) -> int:
    console, notes = make_console(), make_console(stderr=True)
    with progress_display(console if not options.as_json else notes if notes.is_terminal else None) as progress:
        from bigbatch.lm.planning.offload_table import offload_table

        quiet_libraries()
        table = offload_table(config, num_cards=options.cards, host_memory=options.host_memory, progress=progress)
    if options.as_json:
        console.print_unbroken(json.dumps(table_as_json(table)))
    else:
        for line in describe_table(table):
            console.print(line)
    return FITS if any(row.is_chosen for row in table.rows) else DOES_NOT_FIT


def describe(forecast: "Forecast", *, width: int = DRAWING_COLUMNS) -> Iterator[str]:
    """Yield the lines of a forecast; in less than 80 columns, without the drawing of the micro-batches."""
    config = forecast.config
    trained = (
        "all trained"
        if forecast.num_trained == forecast.num_parameters
        else f"{forecast.num_trained:,} of them trained"
    )
    yield f"{config.model}, {forecast.num_parameters:,} parameters, {trained}, on {forecast.target.name}"
    yield from forecast.notes
    yield ""
    yield from _memory(forecast)
    yield ""
    yield "first update:"
    yield from str(forecast.plan).splitlines() if width >= DRAWING_COLUMNS else _microbatches(forecast.plan)
    yield ""
    yield _time(forecast)
    yield from _memory_savings(forecast)


def _microbatches(plan: "Plan") -> Iterator[str]:
    """Yield the summary of the first update and a table of its micro-batches in 37 columns."""
    summary, limit, *_, largest = str(plan).splitlines()
    yield from (summary, limit, "", f"{'#':>6}{'seqs':>8}{'longest':>10}{'tokens':>13}")
    shown = list(enumerate(plan.microbatches[0]))
    hidden = len(shown) - 2 * MOST_ROWS
    for i, rows in shown if hidden <= 0 else (*shown[:MOST_ROWS], *shown[-MOST_ROWS:]):
        if hidden > 0 and i == len(shown) - MOST_ROWS:
            yield f"{'…':>6} {hidden:,} more"
        lengths = [plan.lengths[index] for index in rows]
        yield f"{i:>6}{len(lengths):>8,}{max(lengths, default=0):>10,}{sum(lengths):>13,}"
    yield from ("", largest)


def _memory(forecast: "Forecast") -> Iterator[str]:
    prediction, budget = forecast.prediction, forecast.target.budget
    size = plural(forecast.size, "token" if forecast.unit == "tokens" else "sequence")
    alone = ", longer sequences alone" if forecast.unit == "tokens" and forecast.size < forecast.longest else ""
    yield f"micro-batches of up to {size}{alone}: {forecast.reason}"
    yield f"peak memory of an update (phase: {prediction.phase}):"
    for name, num_bytes in prediction.parts.items():
        yield f"  {name:<14}{describe_bytes(num_bytes):>12}"
    yield f"  {'total':<14}{describe_bytes(prediction.peak_bytes):>12}"
    if budget is None:
        yield "  available memory is not known: pass a GPU, such as --gpu h100, or an amount, such as --memory 24GiB"
    else:
        needed, usable = describe_bytes(prediction.peak_bytes), describe_bytes(budget.usable_bytes)
        verdict = "fits" if forecast.fits else "does not fit"
        yield f"  {verdict}: {needed} needed, {usable} usable {_limit(forecast.config, budget)}"
        if not forecast.fits and _may_offload(forecast.config):
            yield "  --offload auto plans a run on a GPU that keeps training state in host memory"


def _may_offload(config: TrainConfig) -> bool:
    sharded, narrow = config.parallel != "ddp", config.optimizer == "adamw-8bit" or config.precision == "fp8"
    return config.offload == "none" and not sharded and not narrow


def _limit(config: TrainConfig, budget: "MemoryBudget") -> str:
    """Return where the usable memory comes from: a GPU by name, a requested limit, or the free memory."""
    if config.gpu is not None:
        return f"on {config.gpu}"
    if not budget.usable_bytes:
        return f"of {budget.requested or describe_bytes(budget.limit_bytes)} (the process itself uses as much)"
    return f"of {budget.requested}" if budget.requested else f"of {describe_bytes(budget.limit_bytes)} free"


def _time(forecast: "Forecast") -> str:
    updates = plural(forecast.num_updates, "update")
    if forecast.update_s is None:
        return f"{updates}; the time per update was not measured: {forecast.untimed}"
    return (
        f"time per update: {_about(forecast.update_s)} (measured with random weights); {updates}: "
        f"{_about(forecast.update_s * forecast.num_updates)}, without validation"
    )


def _memory_savings(forecast: "Forecast") -> Iterator[str]:
    if not forecast.memory_savings:
        return
    yield "settings that lower the peak for the same micro-batch:"
    width = max(26, *(len(saving.flags) for saving in forecast.memory_savings))
    for saving in forecast.memory_savings:
        change = _change(saving.peak_bytes - forecast.prediction.peak_bytes)
        fits = ", which fits" if saving.fits and not forecast.fits else ""
        yield f"  {saving.flags:<{width}}{describe_bytes(saving.peak_bytes):>12}  ({change}){fits}"


def as_json(forecast: "Forecast") -> dict[str, Any]:
    """Convert a forecast to JSON values."""
    budget, plan = forecast.target.budget, forecast.plan
    return {
        "model": forecast.config.model,
        "parameters": forecast.num_parameters,
        "trained_parameters": forecast.num_trained,
        "device": forecast.target.name,
        "limit_bytes": None if budget is None else budget.limit_bytes,
        "usable_bytes": None if budget is None else budget.usable_bytes,
        "fits": forecast.fits,
        "peak_bytes": forecast.prediction.peak_bytes,
        "peak_phase": forecast.prediction.phase,
        "parts": dict(forecast.prediction.parts),
        "microbatch": {"unit": forecast.unit, "size": forecast.size, "reason": forecast.reason},
        "first_update": {
            "sequences": len(plan.lengths),
            "tokens": plan.tokens,
            "layout": plan.layout,
            "padded_tokens": plan.padded_tokens,
            "num_microbatches": plan.num_microbatches,
            "microbatches": [[plan.lengths[i] for i in rows] for rows in plan.microbatches[0]],
        },
        "updates": forecast.num_updates,
        "update_s": forecast.update_s,
        "levers": [
            {"flags": saving.flags, "peak_bytes": saving.peak_bytes, "fits": saving.fits}
            for saving in forecast.memory_savings
        ],
        "notes": list(forecast.notes),
    }


def _about(seconds: float) -> str:
    return f"about {duration(seconds)}" if seconds >= 0.05 else "less than 0.1 s"


def _change(num_bytes: int) -> str:
    return f"{'−' if num_bytes < 0 else '+'}{describe_bytes(abs(num_bytes))}"
