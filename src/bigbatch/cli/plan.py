"""``bigbatch plan``: what a run is going to need, before anything is spent; or one JSON object of it."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bigbatch.cli.console import duration, make_console, preparing, quiet_libraries
from bigbatch.cli.options import PlanOptions
from bigbatch.limit import describe_bytes
from bigbatch.lm.config import TrainConfig

if TYPE_CHECKING:
    from bigbatch.lm.forecast import Forecast

FITS = 0
DOES_NOT_FIT = 1


def run(config: TrainConfig, options: PlanOptions) -> int:
    """Print the forecast; return 1 only if a single micro-batch does not fit in the memory."""
    console, notes = make_console(), make_console(stderr=True)
    with preparing(console if not options.as_json else notes if notes.is_terminal else None) as say:
        from bigbatch.lm.forecast import forecast

        quiet_libraries()
        found = forecast(config, say=say)
    if options.as_json:
        console.print(json.dumps(as_json(found)))
    else:
        for line in describe(found):
            console.print(line)
    return DOES_NOT_FIT if found.fits is False else FITS


def describe(found: "Forecast") -> Iterator[str]:
    """Yield the lines of a forecast."""
    config, prediction = found.config, found.prediction
    trained = "all trained" if found.num_trained == found.num_parameters else f"{found.num_trained:,} of them trained"
    yield f"{config.model}, {found.num_parameters:,} parameters, {trained}, on {found.target.name}"
    yield from found.notes
    yield ""
    yield f"peak of an update, in {prediction.phase}, with micro-batches of at most {found.size:,} {_unit(found)}"
    for name, num_bytes in prediction.parts.items():
        yield f"  {name:<14}{describe_bytes(num_bytes):>12}"
    yield f"  {'in all':<14}{describe_bytes(prediction.peak_bytes):>12}"
    room = found.target.room
    if room is None:
        yield "  of how much is not known: name a card, such as --gpu h100, or an amount, such as --memory 24GiB"
    elif found.fits:
        yield f"  which fits: {room}"
    else:
        yield f"  which does NOT fit: {room}"
    yield ""
    yield "the first update"
    yield str(found.plan)
    yield ""
    if found.update_s is not None:
        yield f"an update takes about {duration(found.update_s)}, measured with random weights"
    else:
        yield "how long an update takes was not measured: the run could not begin here within seconds"
    if found.levers:
        yield "what one setting more would make of the peak, with the same micro-batch:"
    for flags, peak_bytes in found.levers:
        yield f"  {flags:<26}{describe_bytes(peak_bytes):>12}  ({_change(peak_bytes - prediction.peak_bytes)})"


def as_json(found: "Forecast") -> dict[str, Any]:
    """Turn a forecast into what JSON can hold."""
    room, plan = found.target.room, found.plan
    return {
        "model": found.config.model,
        "parameters": found.num_parameters,
        "trained_parameters": found.num_trained,
        "device": found.target.name,
        "limit_bytes": None if room is None else room.limit_bytes,
        "usable_bytes": None if room is None else room.usable_bytes,
        "fits": found.fits,
        "peak_bytes": found.prediction.peak_bytes,
        "peak_phase": found.prediction.phase,
        "parts": dict(found.prediction.parts),
        "microbatch": {"unit": found.unit, "size": found.size},
        "first_update": {
            "sequences": len(plan.lengths),
            "tokens": plan.tokens,
            "padded_tokens": plan.padded_tokens,
            "num_microbatches": plan.num_microbatches,
            "microbatches": [list(rows) for rows in plan.microbatches[0]],
        },
        "update_s": found.update_s,
        "levers": [{"flags": flags, "peak_bytes": peak_bytes} for flags, peak_bytes in found.levers],
        "notes": list(found.notes),
    }


def _unit(found: "Forecast") -> str:
    return "tokens" if found.unit == "tokens" else "sequences"


def _change(num_bytes: int) -> str:
    return f"{'−' if num_bytes < 0 else '+'}{describe_bytes(abs(num_bytes))}"
