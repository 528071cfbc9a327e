"""The page: one self-contained HTML file for screens, screen readers and print."""

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.resources import files

from bigbatch import __version__
from bigbatch.errors import InputError
from bigbatch.lm.report import comparison, sections, verification_section
from bigbatch.lm.report.guidance import Guidance, batch_advice, next_commands
from bigbatch.lm.report.html import tag, text
from bigbatch.lm.report.html_figures import figure
from bigbatch.lm.report.run_charts import RunCharts
from bigbatch.lm.report.run_reader import Run
from bigbatch.lm.report.svg_chart import Chart

MOST_RUNS = 8  # one colour each
REFRESH_S = 10


def page(
    runs: Sequence[Run],
    *,
    guidance: Sequence[Guidance] | None = None,
    refresh: bool = False,
    now: datetime | None = None,
) -> str:
    """Return the HTML page of one run, or of several for comparison.

    Args:
        runs: At most 8.
        guidance: Advice and commands for each run.
        refresh: Whether the page reloads itself every 10 seconds.
        now: Time of writing that the page shows; by default the current time.

    Raises:
        InputError: There are more than 8 runs.
    """
    if len(runs) > MOST_RUNS:
        raise InputError(f"{len(runs)} runs are too many for one page: name at most {MOST_RUNS}.")
    names = _names(runs)
    title = " vs. ".join(names) if len(runs) < 4 else f"Comparison of {len(runs)} runs"
    found = [Guidance()] * len(runs) if guidance is None else guidance
    parts = _one(runs[0], found[0]) if len(runs) == 1 else _several(runs, names, found)
    moment = (now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M:%S UTC")
    again = f"; reloaded every {REFRESH_S} seconds while the run is running" if refresh else ""
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:\">",
        f'<meta http-equiv="refresh" content="{REFRESH_S}">' if refresh else "",
        '<link rel="icon" href="data:,">',
        tag("title", text(f"{title} · bigbatch")),
        tag("style", _resource("style.css")),
    ]
    body = [
        tag("header", tag("p", "bigbatch report", class_="brand") + tag("h1", text(title))),
        tag("main", "".join(parts)),
        tag(
            "footer",
            tag("p", text(f"Written {moment} by bigbatch {__version__}{again}. This page loads no other files.")),
        ),
        tag("script", _resource("readout.js")),
    ]
    return f'<!doctype html>\n<html lang="en"><head>{"".join(head)}</head><body>{"".join(body)}</body></html>\n'


def _one(run: Run, found: Guidance) -> Iterator[str]:
    charts = RunCharts([run], [run.name])
    yield sections.status(run) + next_commands(found)
    if run.columns.steps:
        yield sections.tiles(run)
    yield _section("Learning", charts.learning(), _missing_learning(run))
    batch = charts.batch()
    yield _section("Batch", batch, "", batch_advice(found) + sections.window(run))
    yield _section("Speed and memory", charts.cost(), "")
    yield _section("Samples", (), "", sections.samples(run))
    yield _section("History", (), "", sections.history(run))
    yield _section("Verification", (), "", verification_section.verification(run))
    both = tag("div", sections.settings(run) + sections.environment(run), class_="tables")
    yield _section("Settings and versions", (), "", both)


def _several(runs: Sequence[Run], names: Sequence[str], found: Sequence[Guidance]) -> Iterator[str]:
    charts = RunCharts(runs, names)
    yield _section("Comparison", (), "", comparison.compare(runs, names))
    learning = charts.learning()
    yield _section("Learning", learning, "" if learning else "No update has been logged yet.")
    advice = [(name, batch_advice(each)) for name, each in zip(names, found, strict=True) if each.advice is not None]
    of_runs = "".join(tag("h3", text(name)) + words for name, words in advice)
    yield _section("Batch", charts.batch(), "", of_runs)
    yield _section("Speed and memory", charts.cost(), "")
    details = [
        tag(
            "details",
            tag("summary", text(name))
            + sections.status(run)
            + next_commands(each)
            + sections.samples(run)
            + sections.history(run),
        )
        for run, name, each in zip(runs, names, found, strict=True)
    ]
    yield _section("Each run", (), "", "".join(details))


def _section(title: str, charts: Sequence[Chart], instead: str, rest: str = "") -> str:
    """Return a section, or nothing if it is empty; ``instead`` is the note for missing charts."""
    drawn = tag("div", "".join(map(figure, charts)), class_="charts") if charts else ""
    missing = tag("p", text(instead), class_="missing") if instead and not charts else ""
    words = tag("p", text(instead), class_="missing") if instead and charts else ""
    if not (drawn or missing or rest):
        return ""
    return tag("section", tag("h2", text(title)) + missing + drawn + words + rest)


def _missing_learning(run: Run) -> str:
    if not run.columns.steps:
        return "No update has been logged yet."
    return "" if run.columns.has("validation_loss") else "This run has no validation loss yet."


def _names(runs: Sequence[Run]) -> list[str]:
    """Return the name of each run: that of its directory, or its path if several have the same name."""
    counts = Counter(run.name for run in runs)
    return [run.name if counts[run.name] == 1 else str(run.folder) for run in runs]


def _resource(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8").strip()
