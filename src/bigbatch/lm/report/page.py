"""The whole page: one file that needs nothing else, read by eye, by ear and on paper."""

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.resources import files

from bigbatch import __version__
from bigbatch.errors import InputError
from bigbatch.lm.report import comparison, sections, verification_section
from bigbatch.lm.report.html import tag, text
from bigbatch.lm.report.html_figures import figure
from bigbatch.lm.report.run_charts import RunCharts
from bigbatch.lm.report.run_reader import Run
from bigbatch.lm.report.svg_chart import Chart

MOST_RUNS = 8  # that colours tell apart
REFRESH_S = 10


def page(runs: Sequence[Run], *, refresh: bool = False, now: datetime | None = None) -> str:
    """Write the page of a run, or of several beside one another.

    Args:
        runs: At most 8.
        refresh: Whether it loads itself again every 10 seconds, for as long as a run is running.
        now: When it is written.

    Raises:
        InputError: They are more.
    """
    if len(runs) > MOST_RUNS:
        raise InputError(f"{len(runs)} runs cannot be told apart on one page: name at most {MOST_RUNS}.")
    names = _names(runs)
    title = " beside ".join(names) if len(runs) < 4 else f"{len(runs)} runs side by side"
    parts = _one(runs[0]) if len(runs) == 1 else _several(runs, names)
    moment = (now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M:%S UTC")
    again = f", and again every {REFRESH_S} seconds while the run goes on" if refresh else ""
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
        tag("footer", tag("p", text(f"Written {moment} by bigbatch {__version__}{again}. This page loads nothing."))),
        tag("script", _resource("readout.js")),
    ]
    return f'<!doctype html>\n<html lang="en"><head>{"".join(head)}</head><body>{"".join(body)}</body></html>\n'


def _one(run: Run) -> Iterator[str]:
    gallery = RunCharts([run], [run.name])
    yield sections.standing(run)
    if run.columns.steps:
        yield sections.tiles(run)
    yield _section("Learning", gallery.learning(), _missing_learning(run))
    batch = gallery.batch()
    yield _section("Batch", batch, "", _missing_noise(run) + sections.window(run))
    yield _section("Speed and memory", gallery.cost(), "")
    yield _section("What happened", (), "", sections.happened(run))
    yield _section("Proof", (), "", verification_section.proof(run))
    both = tag("div", sections.settings(run) + sections.surroundings(run), class_="tables")
    yield _section("Settings and versions", (), "", both)


def _several(runs: Sequence[Run], names: Sequence[str]) -> Iterator[str]:
    gallery = RunCharts(runs, names)
    yield _section("Side by side", (), "", comparison.side_by_side(runs, names))
    yield _section("Learning", gallery.learning(), "No update is written yet.")
    yield _section("Batch", gallery.batch(), "")
    yield _section("Speed and memory", gallery.cost(), "")
    each = [
        tag("details", tag("summary", text(name)) + sections.standing(run) + sections.happened(run))
        for run, name in zip(runs, names, strict=True)
    ]
    yield _section("What happened", (), "", "".join(each))


def _section(title: str, charts: Sequence[Chart], instead: str, rest: str = "") -> str:
    """Write a section; one without anything is left out, and ``instead`` stands where charts are missing."""
    drawn = tag("div", "".join(map(figure, charts)), class_="charts") if charts else ""
    missing = tag("p", text(instead), class_="missing") if instead and not charts else ""
    words = tag("p", text(instead), class_="missing") if instead and charts else ""
    if not (drawn or missing or rest):
        return ""
    return tag("section", tag("h2", text(title)) + missing + drawn + words + rest)


def _missing_learning(run: Run) -> str:
    if not run.columns.steps:
        return "No update is written yet."
    return "" if run.columns.has("validation_loss") else "There is no validation in this run, or none yet."


def _missing_noise(run: Run) -> str:
    if run.columns.has("noise_scale_items") or not run.columns.steps:
        return ""
    return tag("p", "The gradient noise scale was not measured in this run.", class_="missing")


def _names(runs: Sequence[Run]) -> list[str]:
    """Tell runs apart: by the names of their directories, with as much of the path as it takes."""
    counts = Counter(run.name for run in runs)
    return [run.name if counts[run.name] == 1 else str(run.folder) for run in runs]


def _resource(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8").strip()
