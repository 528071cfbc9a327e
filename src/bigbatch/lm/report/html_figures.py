"""Charts as figures of a page: heading, legend, drawing, caption, table, and the data of the tooltips."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bigbatch.lm.report.axes import number
from bigbatch.lm.report.html import data, table, tag, text
from bigbatch.lm.report.svg_chart import Chart, Line, draw

BLOCKS = 12  # rows of the table of a chart


def figure(chart: Chart) -> str:
    """Return a chart with its heading, legend, caption, table and tooltip data."""
    unit = tag("span", text(chart.unit), class_="unit") if chart.unit else ""
    heading = tag("h3", f"{text(chart.title)} {unit}", id=f"{chart.key}-heading")
    caption = tag("figcaption", tag("p", text(chart.summary)) + _note(chart))
    readings = tag("script", data(_readings(chart)), type="application/json", class_="readings")
    plot = tag("div", draw(chart), class_="plots")
    whole = heading + _legend(chart) + plot + caption + _figures(chart) + readings
    return tag("figure", whole, class_="chart wide-figure" if chart.wide else "chart", id=chart.key)


def _note(chart: Chart) -> str:
    if chart.each == 1:
        return ""
    return tag(
        "p",
        f"Each point combines {chart.each:,} updates: the line shows their mean, the band their minimum and maximum.",
        class_="note",
    )


def _legend(chart: Chart) -> str:
    """Return the legend, if the chart has more than one entry."""
    entries = [(line.name, f"{line.style} s{line.colour}") for line in chart.lines]
    entries += [
        (f"{level.name} {number(level.value, chart.kind)}", "level " + _colour(level.colour)) for level in chart.levels
    ]
    entries += [(marks.name, marks.kind) for marks in chart.marks]
    if len(entries) < 2:
        return ""
    return tag("ul", "".join(tag("li", swatch_of(kind) + text(name)) for name, kind in entries), class_="legend")


def _colour(colour: int | None) -> str:
    return "neutral" if colour is None else f"s{colour}"


def swatch_of(kind: str) -> str:
    """Return the sample of a line in a legend."""
    if kind == "skip":
        inside = tag("path", class_="skip", d="M14 1l5 9h-10Z")
    elif kind == "resume":
        inside = tag("line", class_="resume", x1=14, x2=14, y1=0, y2=12)
    elif kind.startswith("level"):
        inside = tag("line", class_=kind, x1=0, x2=28, y1=6, y2=6)
    else:
        inside = tag("path", class_=f"line {kind}", d="M0 6H28")
        if kind.startswith("dots"):
            inside += tag("circle", class_=f"dot {kind.partition(' ')[2]}", cx=14, cy=6, r=3.4)
    return tag("svg", inside, viewBox="0 0 28 12", class_="swatch", aria_hidden="true")


def _figures(chart: Chart) -> str:
    """Return a table of the values: mean, minimum and maximum of each of 12 ranges of updates."""
    first = min(line.x[0] for line in chart.lines if len(line.x))
    last = max(line.x[-1] for line in chart.lines if len(line.x))
    edges = [first + (last + 1 - first) * block / BLOCKS for block in range(BLOCKS + 1)]
    columns = [_blocks(line, edges) for line in chart.lines]
    rows = []
    for block in range(BLOCKS):
        cells = [_cell(column[block], chart) for column in columns]
        if any(cells):
            rows.append([_stretch(chart, edges[block], edges[block + 1]), *(cell or "–" for cell in cells)])
    words = table(
        [chart.x_label + ("s" if chart.x_label == "update" else ""), *(text(line.name) for line in chart.lines)],
        rows,
        caption=f"{chart.title}: mean (minimum to maximum)",
        numeric=range(1, len(chart.lines) + 1),
    )
    return tag("details", tag("summary", "figures") + words)


def _stretch(chart: Chart, low: float, high: float) -> str:
    begin, end = -int(-low // 1), -int(-high // 1) - 1  # integers from low to below high
    return f"{begin:,}" if end <= begin else f"{begin:,} to {end:,}"


def _blocks(line: Line, edges: Sequence[float]) -> list[NDArray[np.float64]]:
    """Return the values of a line between each two edges."""
    x, y = np.asarray(line.x, np.float64), np.asarray(line.y, np.float64)
    x, y = x[~np.isnan(y)], y[~np.isnan(y)]
    num_blocks = len(edges) - 1
    blocks = np.minimum(num_blocks - 1, ((x - edges[0]) / (edges[-1] - edges[0]) * num_blocks).astype(np.int64))
    return [y[blocks == block] for block in range(num_blocks)]


def _cell(values: NDArray[np.float64], chart: Chart) -> str:
    if not len(values):
        return ""
    low, high = float(values.min()), float(values.max())
    mean = number(float((values / len(values)).sum()), chart.kind)
    spread = f" ({number(low, chart.kind)} to {number(high, chart.kind)})"
    return mean if number(low, chart.kind) == number(high, chart.kind) else mean + spread


def _readings(chart: Chart) -> dict[str, object]:
    """Return the tooltip data: the positions of each line and, as text, their values."""
    return {"label": chart.x_label, "lines": [_reading(line, chart) for line in chart.lines]}


def _reading(line: Line, chart: Chart) -> dict[str, object]:
    points = line.points
    positions, words = [], []
    for x, mean, low, high in zip(points.x, points.mean, points.low, points.high, strict=True):
        if mean == mean:
            positions.append(round(x, 1) if x % 1 else int(x))
            spread = f" ({number(low, chart.kind)} to {number(high, chart.kind)})" if low != high else ""
            words.append(number(mean, chart.kind) + spread)
    return {"name": line.name, "colour": line.colour, "x": positions, "words": words}
