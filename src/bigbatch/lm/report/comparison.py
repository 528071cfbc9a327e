"""Runs beside one another: a table of how they stand, and the settings in which they differ."""

from collections.abc import Sequence

from bigbatch.lm.report.axes import number, written
from bigbatch.lm.report.html import table, tag, text
from bigbatch.lm.report.html_figures import swatch_of
from bigbatch.lm.report.run_charts import median
from bigbatch.lm.report.run_reader import Run
from bigbatch.lm.report.sections import STATES


def side_by_side(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Compare runs in a table, and list the settings in which they differ."""
    rows = []
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        columns = run.columns
        best = min((value for value in columns["validation_loss"] if value == value), default=None)
        peak = max((value for value in columns["peak_bytes"] if value == value), default=None)
        swatch = swatch_of(f"line s{place}")
        rows.append(
            [
                swatch + text(name),
                text(STATES[run.state]),
                text(f"{run.steps:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")),
                text(number(columns.last("loss"))),
                text(number(best)),
                text(number(median(run, "tokens_per_s"), "count")),
                text(number(peak, "bytes")),
                f"{len(columns.skipped):,}",
                f"{len(run.resumes):,}" if run.events else "–",
            ]
        )
    head = [
        "run",
        "state",
        "updates",
        "last loss",
        "best validation",
        "tokens a second",
        "peak memory",
        "skipped",
        "resumes",
    ]
    whole = table(head, rows, caption="The runs", numeric=range(2, 9))
    differing = [
        key for key in _all_settings(runs) if key != "out" and len({written(_of(run, key)) for run in runs}) > 1
    ]
    if not differing:
        return whole + tag("p", "Their settings are the same.")
    rows = [[text(key), *(text(written(_of(run, key))) for run in runs)] for key in differing]
    return whole + table(["setting", *map(text, names)], rows, caption="Settings in which they differ")


def _of(run: Run, key: str) -> object:
    return run.settings.get(key)


def _all_settings(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.settings))
