"""What is told of a run besides its charts: how it stands, what happened, settings and versions."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from bigbatch.lm.report.axes import number, written
from bigbatch.lm.report.html import table, tag, text
from bigbatch.lm.report.metrics_table import Columns
from bigbatch.lm.report.run_charts import median
from bigbatch.lm.report.run_reader import Run
from bigbatch.lm.report.window_plan_chart import draw_window, window_of
from bigbatch.lm.runs.file_names import CONFIG, METRICS

MOST_LINES = 60  # of what happened; the rest is counted
STATES = {
    "running": "running",
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
    "ended": "ended without a word",
}


def standing(run: Run) -> str:
    """Say in a sentence how a run stands."""
    total = run.total_steps
    of = f" of {total:,}" if total else ""
    made = f"{run.steps:,}{of} updates made" if run.steps else "no update is written yet"
    last = run.events[-1] if run.events else {}
    why = str(last.get("why") or "")
    word = {
        "running": f"Running: {made}.",
        "finished": f"Finished: {made}.",
        "stopped": f"Stopped{f' by {why}' if why else ''}: {made}. bigbatch resume goes on with it.",
        "failed": f"Failed: {made}. {why}",
        "ended": f"Not running, and not finished: {made}. bigbatch resume goes on with it.",
    }[run.state]
    sentences = [tag("strong", text(STATES[run.state]), class_=f"state {run.state}") + " " + text(word)]
    if run.columns.num_unreadable:
        count = run.columns.num_unreadable
        lines = "1 line" if count == 1 else f"{count:,} lines"
        sentences.append(text(f"{lines} of {METRICS} could not be read and {'is' if count == 1 else 'are'} left out."))
    return tag("p", " ".join(sentences), class_="standing")


def tiles(run: Run) -> str:
    """Write the figures that are looked for first."""
    columns = run.columns
    best = min((value for value in columns["validation_loss"] if value == value), default=None)
    peak = max((value for value in columns["peak_bytes"] if value == value), default=None)
    found = [
        ("updates", f"{run.steps:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")),
        ("last loss", number(columns.last("loss"))),
        ("best validation loss", number(best)),
        ("tokens a second", number(median(run, "tokens_per_s"), "count")),
        ("peak memory", number(peak, "bytes")),
        ("micro-batches an update", _range(columns)),
        ("skipped updates", f"{len(columns.skipped):,}"),
        ("resumes", f"{len(run.resumes):,}" if run.events else "–"),
    ]
    return tag(
        "dl",
        "".join(tag("div", tag("dt", name) + tag("dd", text(value))) for name, value in found if value != "–"),
        class_="tiles",
    )


def _range(columns: Columns) -> str:
    values = [value for value in columns["num_microbatches"] if value == value]
    if not values:
        return "–"
    low, high = min(values), max(values)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def window(run: Run) -> str:
    """Draw the first window's micro-batches, where the run told of them; say so in a sentence where not."""
    found = window_of(run.last_event_value("window"))
    if found is None:
        return tag("p", "How the first window was cut is not in this run's directory.", class_="missing")
    shares = [
        [f"{place:,}", f"{len(lengths):,}", f"{max(lengths):,}", f"{sum(lengths):,}", f"{found.laid_out(lengths):,}"]
        for place, lengths in found.shown
    ]
    head = ["micro-batch", "sequences", "longest", "tokens", "as laid out"]
    rows = table(head, shares, caption="The micro-batches that are drawn", numeric=range(1, 5))
    entries = [("even", "a sequence")]
    entries += [("odd", "the next one")] if any(len(lengths) > 1 for _, lengths in found.shown) else []
    entries += [("padding", "padding")] if found.laid_out_tokens > found.tokens else []
    swatch = (
        '<svg viewBox="0 0 28 12" class="swatch" aria-hidden="true"><rect class="{}" width="28" height="12"/></svg>'
    )
    legend = "".join(tag("li", swatch.format(kind) + name) for kind, name in entries)
    return tag(
        "figure",
        tag("h3", f"Plan of the first window {tag('span', 'tokens', class_='unit')}", id="window-heading")
        + tag("ul", legend, class_="legend")
        + tag("div", draw_window(found), class_="plots")
        + tag("figcaption", tag("p", text(found.describe())))
        + tag("details", tag("summary", "figures") + rows),
        class_="chart wide-figure",
        id="window",
    )


def happened(run: Run) -> str:
    """List the processes of a run, and the updates that were skipped or had to be run again."""
    parts = []
    processes = list(_processes(run.events))
    if processes:
        head = ["when (UTC)", "update", "what happened"]
        parts.append(table(head, _first(processes, 3), caption="Processes of this run", numeric=(1,)))
    else:
        parts.append(tag("p", "When it began, stopped and went on is not in this run's directory.", class_="missing"))
    updates = list(_updates(run.columns))
    if updates:
        parts.append(table(["updates", "what happened"], _first(updates, 2), caption="Updates out of the ordinary"))
    elif run.columns.steps:
        parts.append(tag("p", "No update was skipped, and none ran out of memory."))
    return "".join(parts)


def _first(rows: list[list[str]], width: int) -> list[list[str]]:
    if len(rows) <= MOST_LINES:
        return rows
    return [*rows[:MOST_LINES], ["…", *[""] * (width - 2), f"{len(rows) - MOST_LINES:,} more"]]


def _processes(events: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    is_open = began = False
    for event in events:
        kind = event.get("event")
        if kind in ("begin", "resume"):
            if is_open:
                yield ["–", "–", "the process ended without a word, as when it is killed"]
            is_open = True
            event = {**event, "again": began}
            began = True
        elif kind in ("stopped", "failed", "finished"):
            is_open = False
        else:
            continue
        step = event.get("step")
        yield [
            tag("span", text(_when(event.get("at"))), class_="when"),
            f"{step:,}" if type(step) is int else "–",
            text(_sentence(event)),
        ]


def _when(at: object) -> str:
    return str(at).replace("T", " ").removesuffix("+00:00") if at else "–"


def _sentence(event: Mapping[str, Any]) -> str:
    kind, why = event["event"], str(event.get("why") or "")
    if kind == "begin":
        began = "began anew, without a checkpoint," if event.get("again") else "began"
        return f"{began} on {event.get('machine', 'a machine that it does not name')}"
    if kind == "resume":
        words = f"went on from checkpoint {event.get('checkpoint')}, on {event.get('machine')}"
        passed = event.get("passed_over")
        for pair in passed if isinstance(passed, list) else []:
            if isinstance(pair, list) and len(pair) == 2:
                words += f"; passed over {pair[0]}: {pair[1]}"
        settings = event.get("settings")
        if isinstance(settings, dict) and settings:
            words += "; with " + ", ".join(f"{name} = {written(value)}" for name, value in settings.items())
        return words
    if kind == "stopped":
        return f"stopped by {why}, after saving" if why else "stopped, after saving"
    return f"failed: {why}" if kind == "failed" else "finished"


def _updates(columns: Columns) -> Iterator[list[str]]:
    skipped = columns.skipped
    runs = groupby(enumerate(skipped), key=lambda pair: (pair[1].step - pair[0], pair[1].reason))
    found: list[tuple[int, list[str]]] = []
    for (_, reason), group in runs:
        steps = [skip.step for _, skip in group]
        name = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
        found.append((steps[0], [name, text(f"skipped, nothing was changed: {reason}")]))
    for step, retries in zip(columns.steps, columns["retries"], strict=True):
        if retries == retries and retries > 0:
            times = "once" if retries == 1 else f"{retries:,.0f} times"
            found.append((step, [f"{step:,}", f"memory ran out {times}; run again in smaller pieces"]))
    for _, row in sorted(found, key=lambda pair: pair[0]):
        yield row


def settings(run: Run) -> str:
    """List every setting, those marked that a resume changed."""
    if not run.settings:
        return tag("p", f"{CONFIG} does not exist or cannot be read, so the settings are not known.", class_="missing")
    rows = [
        [
            text(name),
            text(written(value)) + (" " + tag("em", "(changed since it began)") if name in run.changed else ""),
        ]
        for name, value in run.settings.items()
    ]
    return table(["setting", "value"], rows, caption="Settings, as flags and TOML name them")


def surroundings(run: Run) -> str:
    """List machine, model and versions."""
    rows = [
        [name, text(shown)]
        for name, key in (
            ("machine", "machine"),
            ("parameters", "parameters"),
            ("of them trained", "trained"),
            ("computed anew", "recomputed"),
        )
        if (told := run.last_event_value(key)) is not None
        and (shown := f"{told:,}" if type(told) is int else str(told))
    ]
    versions = run.last_event_value("versions")
    if isinstance(versions, dict):
        rows += [[text(name), text(value)] for name, value in versions.items()]
    if not rows:
        return tag("p", "Machine and versions are not in this run's directory.", class_="missing")
    return table(["what", "which"], rows, caption="Machine, model and versions")
