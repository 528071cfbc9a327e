"""Comparison of runs: a table of their results, and the settings in which they differ."""

from collections.abc import Sequence

from bigbatch.lm.report.axes import format_setting, number
from bigbatch.lm.report.html import table, tag, text
from bigbatch.lm.report.html_figures import swatch_of
from bigbatch.lm.report.run_charts import median
from bigbatch.lm.report.run_reader import Run
from bigbatch.lm.report.sections import STATES


def compare(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return a table that compares runs, and one of the settings in which they differ."""
    has_perplexity = any(run.columns.has("validation_perplexity") for run in runs)
    has_accuracy = any(run.columns.has("validation_accuracy") for run in runs)
    rows = []
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        columns = run.columns
        swatch = swatch_of(f"line s{place}")
        rows.append(
            [
                swatch + text(name),
                text(STATES[run.state]),
                text(f"{run.steps:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")),
                text(number(columns.last("loss"))),
                text(number(columns.lowest("validation_loss"))),
                *([text(number(columns.lowest("validation_perplexity")))] if has_perplexity else []),
                *([text(number(columns.highest("validation_accuracy"), "share"))] if has_accuracy else []),
                text(number(median(run, "tokens_per_s"), "count")),
                text(number(columns.highest("peak_bytes"), "bytes")),
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
        *(["best perplexity"] if has_perplexity else []),
        *(["best accuracy"] if has_accuracy else []),
        "tokens/s",
        "peak memory",
        "skipped",
        "resumes",
    ]
    results = table(head, rows, caption="The runs", numeric=range(2, len(head)))
    values = {key: [format_setting(run.settings.get(key)) for run in runs] for key in _all_settings(runs)}
    differing = [key for key, of_runs in values.items() if key != "out" and len(set(of_runs)) > 1]
    if not differing:
        return results + tag("p", "All settings are the same.")
    rows = [[text(key), *map(text, values[key])] for key in differing]
    return results + table(["setting", *map(text, names)], rows, caption="Settings in which they differ")


def _all_settings(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.settings))
