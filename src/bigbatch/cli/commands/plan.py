"""``bigbatch plan``: what a run is going to need, before anything is spent; or one JSON object of it."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bigbatch.cli.console import duration, make_console, progress_display, quiet_libraries
from bigbatch.cli.options import PlanOptions
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.text import plural
from bigbatch.memory.limit import describe_bytes

if TYPE_CHECKING:
    from bigbatch.lm.planning.forecast import Forecast

FITS = 0
DOES_NOT_FIT = 1


def run(config: TrainConfig, options: PlanOptions) -> int:
    """Print the forecast; return 1 only if a micro-batch does not fit in the memory."""
    console, notes = make_console(), make_console(stderr=True)
    with progress_display(console if not options.as_json else notes if notes.is_terminal else None) as progress:
        from bigbatch.lm.planning.forecast import forecast

        quiet_libraries()
        found = forecast(config, progress=progress)
    if options.as_json:
        console.print(json.dumps(as_json(found)))
    else:
        for line in describe(found):
            console.print(line)
    return DOES_NOT_FIT if found.fits is False else FITS


def describe(found: "Forecast") -> Iterator[str]:
    """Yield the lines of a forecast."""
    config = found.config
    trained = "all trained" if found.num_trained == found.num_parameters else f"{found.num_trained:,} of them trained"
    yield f"{config.model}, {found.num_parameters:,} parameters, {trained}, on {found.target.name}"
    yield from found.notes
    yield ""
    yield from _memory(found)
    yield ""
    yield "the first update"
    yield str(found.plan)
    yield ""
    yield _time(found)
    yield from _memory_savings(found)


def _memory(found: "Forecast") -> Iterator[str]:
    prediction, budget = found.prediction, found.target.budget
    size = plural(found.size, "token" if found.unit == "tokens" else "sequence")
    alone = ", longer sequences alone" if found.unit == "tokens" and found.size < found.longest else ""
    yield f"micro-batches of at most {size}{alone}: {found.reason}"
    yield f"memory at the peak of an update, in {prediction.phase}"
    for name, num_bytes in prediction.parts.items():
        yield f"  {name:<14}{describe_bytes(num_bytes):>12}"
    yield f"  {'in all':<14}{describe_bytes(prediction.peak_bytes):>12}"
    if budget is None:
        yield "  of how much is not known: name a card, such as --gpu h100, or an amount, such as --memory 24GiB"
    else:
        yield f"  which {'fits' if found.fits else 'does NOT fit'}: {budget}"


def _time(found: "Forecast") -> str:
    updates = plural(found.num_updates, "update")
    if found.update_s is None:
        return f"{updates}; how long one takes was not measured: {found.untimed}"
    return (
        f"an update takes {_about(found.update_s)}, measured with random weights; {updates} "
        f"{_about(found.update_s * found.num_updates)}, validation not counted"
    )


def _memory_savings(found: "Forecast") -> Iterator[str]:
    if not found.memory_savings:
        return
    yield "what would lower the peak of the same micro-batch:"
    width = max(26, *(len(saving.flags) for saving in found.memory_savings))
    for saving in found.memory_savings:
        change = _change(saving.peak_bytes - found.prediction.peak_bytes)
        fits = ", which fits" if saving.fits and not found.fits else ""
        yield f"  {saving.flags:<{width}}{describe_bytes(saving.peak_bytes):>12}  ({change}){fits}"


def as_json(found: "Forecast") -> dict[str, Any]:
    """Turn a forecast into what JSON can hold."""
    budget, plan = found.target.budget, found.plan
    return {
        "model": found.config.model,
        "parameters": found.num_parameters,
        "trained_parameters": found.num_trained,
        "device": found.target.name,
        "limit_bytes": None if budget is None else budget.limit_bytes,
        "usable_bytes": None if budget is None else budget.usable_bytes,
        "fits": found.fits,
        "peak_bytes": found.prediction.peak_bytes,
        "peak_phase": found.prediction.phase,
        "parts": dict(found.prediction.parts),
        "microbatch": {"unit": found.unit, "size": found.size, "reason": found.reason},
        "first_update": {
            "sequences": len(plan.lengths),
            "tokens": plan.tokens,
            "layout": plan.layout,
            "padded_tokens": plan.padded_tokens,
            "num_microbatches": plan.num_microbatches,
            "microbatches": [[plan.lengths[i] for i in rows] for rows in plan.microbatches[0]],
        },
        "updates": found.num_updates,
        "update_s": found.update_s,
        "levers": [
            {"flags": saving.flags, "peak_bytes": saving.peak_bytes, "fits": saving.fits}
            for saving in found.memory_savings
        ],
        "notes": list(found.notes),
    }


def _about(seconds: float) -> str:
    return f"about {duration(seconds)}" if seconds >= 0.05 else "less than 0.1 s"


def _change(num_bytes: int) -> str:
    return f"{'−' if num_bytes < 0 else '+'}{describe_bytes(abs(num_bytes))}"
