"""Sections of a page without charts: status, history, settings and versions."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from bigbatch.lm.report.axes import format_setting, number
from bigbatch.lm.report.html import table, tag, text
from bigbatch.lm.report.metrics_table import Columns
from bigbatch.lm.report.run_charts import median
from bigbatch.lm.report.run_reader import Run
from bigbatch.lm.report.window_plan_chart import draw_window, window_of
from bigbatch.lm.runs.file_names import CONFIG, METRICS

MOST_LINES = 60  # rows of a table; the rest is counted
MOST_SAMPLES = 8
STATES = {
    "running": "running",
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
    "ended": "ended unexpectedly",
}


def status(run: Run) -> str:
    """Return the state of a run as a sentence."""
    total = run.total_steps
    of = f" of {total:,}" if total else ""
    done = f"{run.steps:,}{of} updates done" if run.steps else "no update has been logged yet"
    last = run.events[-1] if run.events else {}
    why = str(last.get("why") or "")
    word = {
        "running": f"Running: {done}.",
        "finished": f"Finished: {done}.",
        "stopped": f"Stopped{f' by {why}' if why else ''}: {done}.",
        "failed": f"Failed: {done}. {why}",
        "ended": f"Not running and not finished: {done}.",
    }[run.state]
    sentences = [tag("strong", text(STATES[run.state]), class_=f"state {run.state}") + " " + text(word)]
    if run.columns.num_unreadable:
        count = run.columns.num_unreadable
        lines = "1 line" if count == 1 else f"{count:,} lines"
        sentences.append(text(f"{lines} of {METRICS} could not be read and {'was' if count == 1 else 'were'} skipped."))
    return tag("p", " ".join(sentences), class_="status")


def tiles(run: Run) -> str:
    """Return the key figures of a run."""
    columns = run.columns
    found = [
        ("updates", f"{run.steps:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")),
        ("last loss", number(columns.last("loss"))),
        ("best validation loss", number(columns.lowest("validation_loss"))),
        ("best validation perplexity", number(columns.lowest("validation_perplexity"))),
        ("best validation accuracy", number(columns.highest("validation_accuracy"), "share")),
        ("tokens/s", number(median(run, "tokens_per_s"), "count")),
        (
            "peak memory" if run.is_on_cuda else "peak memory of the process",
            number(columns.highest("peak_bytes"), "bytes"),
        ),
        ("micro-batches per update", _range(columns)),
        ("skipped updates", f"{len(columns.skipped):,}"),
        ("resumes", f"{len(run.resumes):,}" if run.resumes else "–"),
    ]
    return tag(
        "dl",
        "".join(tag("div", tag("dt", name) + tag("dd", text(value))) for name, value in found if value != "–"),
        class_="tiles",
    )


def _range(columns: Columns) -> str:
    values = columns.finite("num_microbatches")[1].tolist()
    if not values:
        return "–"
    low, high = min(values), max(values)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def window(run: Run) -> str:
    """Return a drawing of the first window's micro-batches, or a note if the run has not recorded them."""
    found = window_of(run.last_event_value("window"), noun=run.noun)
    if found is None:
        return tag("p", "This run has not recorded the plan of its first window.", class_="missing")
    shares = [
        [f"{place:,}", f"{len(lengths):,}", f"{max(lengths):,}", f"{sum(lengths):,}", f"{found.laid_out(lengths):,}"]
        for place, lengths in found.shown
    ]
    head = ["micro-batch", f"{run.noun}s", "longest", "tokens", "with padding"]
    rows = table(head, shares, caption="Micro-batches in the drawing", numeric=range(1, 5))
    entries = [("even", f"1 {run.noun}")]
    entries += [("odd", f"the next {run.noun}")] if any(len(lengths) > 1 for _, lengths in found.shown) else []
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


def samples(run: Run) -> str:
    """Return the texts that the model generated, the latest first; nothing without one."""
    shown = [
        tag("figcaption", f"after update {sample.step:,}, from the prompt {tag('code', text(sample.prompt))}")
        + tag("pre", text(sample.text))
        for sample in reversed(run.samples)
        if sample.step <= run.steps
    ]
    return "".join(tag("figure", inside, class_="sample") for inside in shown[:MOST_SAMPLES])


def history(run: Run) -> str:
    """Return the processes of a run, and its skipped and retried updates."""
    parts = []
    processes = list(_processes(run.events))
    if processes:
        head = ["when (UTC)", "update", "event"]
        parts.append(table(head, _truncated(processes, 3), caption="Processes of this run", numeric=(1,)))
    else:
        parts.append(tag("p", "This run has not recorded its starts, stops and resumes.", class_="missing"))
    updates = list(_updates(run.columns))
    if updates:
        parts.append(table(["updates", "event"], _truncated(updates, 2), caption="Skipped and retried updates"))
    elif run.columns.steps:
        parts.append(tag("p", "No update was skipped or ran out of memory."))
    return "".join(parts)


def _truncated(rows: list[list[str]], width: int) -> list[list[str]]:
    if len(rows) <= MOST_LINES:
        return rows
    return [*rows[:MOST_LINES], ["…", *[""] * (width - 2), f"{len(rows) - MOST_LINES:,} more"]]


def _processes(events: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    is_open = has_begun = False
    for event in events:
        kind = event.get("event")
        if kind in ("begin", "resume"):
            if is_open:
                yield ["–", "–", "the process ended unexpectedly (killed?)"]
            is_open = True
            event = {**event, "again": has_begun}
            has_begun = True
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
        began = "started again without a checkpoint" if event.get("again") else "started"
        return f"{began} on {event.get('machine', 'an unknown machine')}"
    if kind == "resume":
        words = f"resumed from checkpoint {event.get('checkpoint')}, on {event.get('machine')}"
        passed = event.get("passed_over")
        for pair in passed if isinstance(passed, list) else []:
            if isinstance(pair, list) and len(pair) == 2:
                words += f"; skipped {pair[0]}: {pair[1]}"
        settings = event.get("settings")
        if isinstance(settings, dict) and settings:
            words += "; with " + ", ".join(f"{name} = {format_setting(value)}" for name, value in settings.items())
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
        found.append((steps[0], [name, text(f"skipped without a change: {reason}")]))
    for step, retries in zip(columns.steps, columns["retries"], strict=True):
        if retries == retries and retries > 0:
            times = "once" if retries == 1 else f"{retries:,.0f} times"
            found.append((step, [f"{step:,}", f"out of memory {times}; retried with smaller micro-batches"]))
    for _, row in sorted(found, key=lambda pair: pair[0]):
        yield row


def settings(run: Run) -> str:
    """Return a table of all settings; those that a resume changed are marked."""
    if not run.settings:
        return tag("p", f"{CONFIG} does not exist or cannot be read, so the settings are unknown.", class_="missing")
    rows = [
        [
            text(name),
            text(format_setting(value)) + (" " + tag("em", "(changed by resume)") if name in run.changed else ""),
        ]
        for name, value in run.settings.items()
    ]
    return table(["setting", "value"], rows, caption="Settings, as flags and TOML name them")


def environment(run: Run) -> str:
    """Return a table of machine, model and versions."""
    rows = [
        [name, text(shown)]
        for name, key in (
            ("machine", "machine"),
            ("parameters", "parameters"),
            ("trainable parameters", "trained"),
            ("activation checkpointing", "recomputed"),
        )
        if (value := run.last_event_value(key)) is not None
        and (shown := f"{value:,}" if type(value) is int else str(value))
    ]
    fp8 = run.last_event_value("fp8")
    if isinstance(fp8, dict):
        about = f"{fp8.get('layers')}; not the update of bf16, and its rounding depends on the micro-batch"
        rows += [["fp8", text(about)], ["fp8, measured", text(str(fp8.get("note")).removeprefix("fp8: "))]]
    versions = run.last_event_value("versions")
    if isinstance(versions, dict):
        rows += [[text(name), text(value)] for name, value in versions.items()]
    if not rows:
        return tag("p", "This run has not recorded its machine and versions.", class_="missing")
    return table(["name", "value"], rows, caption="Machine, model and versions")
