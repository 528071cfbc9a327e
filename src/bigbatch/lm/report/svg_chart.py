"""A chart as SVG: lines, dots, bands and marks over updates, in three widths of which a page shows one.

Colours are CSS classes, so that one drawing serves light mode, dark mode and print. Each width is drawn separately and
not scaled, so that text stays readable.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from bigbatch.lm.report.axes import Kind, Scale, step_scale, value_scale, wants_log
from bigbatch.lm.report.downsampling import Points, reduced
from bigbatch.lm.report.html import tag, text

CHARACTER = 8.0  # room for a character in a font of 13: of DejaVu Sans Mono, a wide font, it is 7.8
TOP, BOTTOM, RIGHT = 12, 38, 16


class Size(NamedTuple):
    """Size of a drawing, in pixels."""

    name: str
    width: int
    height: int


SIZES = (Size("wide", 1000, 320), Size("middle", 600, 290), Size("narrow", 350, 250))


@dataclass(frozen=True)
class Line:
    """Values over updates.

    Attributes:
        name: Name in the legend.
        x: Updates, increasing.
        y: Values, as many; NaN if missing.
        colour: 0 to 7.
        style: ``line``; ``dashed``; ``dots``: a dot per value, joined by a thin line; ``steps``: constant until it
            changes.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    style: Literal["line", "dashed", "dots", "steps"] = "line"

    @cached_property
    def points(self) -> Points:
        """The downsampled points that are drawn."""
        pairs = [(x, y) for x, y in zip(self.x, self.y, strict=True) if y == y] if self.style == "dots" else None
        return reduced([x for x, _ in pairs], [y for _, y in pairs]) if pairs else reduced(self.x, self.y)


@dataclass(frozen=True)
class ReferenceLine:
    """A horizontal dashed line."""

    name: str
    value: float
    colour: int | None = None


@dataclass(frozen=True)
class EventMarks:
    """Marks at updates: ``skip`` is a triangle on the axis, ``resume`` a vertical line."""

    name: str
    kind: Literal["skip", "resume"]
    x: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """A chart; at least one of its lines has a finite value.

    Attributes:
        key: Identifier in the page.
        title: Heading.
        unit: Unit of the values, next to the title.
        lines: Lines, drawn in this order.
        levels: Horizontal reference lines.
        marks: Marks of events.
        kind: Format of the values.
        from_zero: Whether a linear axis starts at zero.
        x_label: Label of the horizontal axis.
        summary: Caption, which is also the text alternative of the drawing.
        wide: Whether the figure has the width of the page.
    """

    key: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    levels: tuple[ReferenceLine, ...] = ()
    marks: tuple[EventMarks, ...] = ()
    kind: Kind = "plain"
    from_zero: bool = False
    x_label: str = "update"
    summary: str = ""
    wide: bool = False

    @cached_property
    def is_log(self) -> bool:
        """Whether the axis of the values is logarithmic."""
        return not self.from_zero and wants_log(self.values)

    @cached_property
    def values(self) -> list[float]:
        """All values that the axis has to contain."""
        return [value for line in self.lines for value in line.points.finite] + [level.value for level in self.levels]

    @property
    def each(self) -> int:
        """Updates per point of the line with the most."""
        return max(line.points.each for line in self.lines)


def draw(chart: Chart) -> str:
    """Return a chart as SVG in every width."""
    return "".join(_draw(chart, size) for size in SIZES)


@dataclass(frozen=True)
class _Frame:
    """Mapping of values to pixels."""

    size: Size
    x: Scale
    y: Scale
    left: float

    @property
    def right(self) -> float:
        return float(self.size.width - RIGHT)

    @property
    def bottom(self) -> float:
        return float(self.size.height - BOTTOM)

    def px(self, value: float) -> str:
        return _short(self.left + self.x.at(value) * (self.right - self.left))

    def py(self, value: float) -> str:
        return _short(self.bottom - self.y.at(value) * (self.bottom - TOP))


def _draw(chart: Chart, size: Size) -> str:
    frame = _frame(chart, size)
    parts = [
        *_grid(frame, chart),
        *(part for marks in chart.marks for part in _marks(frame, marks)),
        *(_band(frame, line) for line in chart.lines),
        *(_level(frame, level) for level in chart.levels),
        *(part for line in chart.lines for part in _line(frame, line)),
    ]
    name = f"{chart.key}-{size.name}"
    return tag(
        "svg",
        tag("title", text(chart.title), id=f"{name}-title")
        + tag("desc", text(chart.summary), id=f"{name}-desc")
        + "".join(parts),
        class_=f"plot {size.name}",
        viewBox=f"0 0 {size.width} {size.height}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
        data_left=_short(frame.left),
        data_right=_short(frame.right),
        data_top=TOP,
        data_bottom=_short(frame.bottom),
        data_first=f"{frame.x.low:.10g}",
        data_last=f"{frame.x.high:.10g}",
    )


def _frame(chart: Chart, size: Size) -> _Frame:
    y = value_scale(
        chart.values,
        is_log=chart.is_log,
        from_zero=chart.from_zero,
        kind=chart.kind,
        most_ticks=6 if size.height > 260 else 5,
    )
    left = 14 + CHARACTER * max(len(y.label(tick)) for tick in y.ticks)
    first = min(line.x[0] for line in chart.lines if len(line.x))
    last = max(line.x[-1] for line in chart.lines if len(line.x))
    return _Frame(size, step_scale(first, last, most_ticks=max(3, size.width // 95)), y, left)


def _grid(frame: _Frame, chart: Chart) -> Iterator[str]:
    for tick in frame.y.ticks:
        y = frame.py(tick)
        yield tag("line", class_="grid", x1=_short(frame.left), x2=_short(frame.right), y1=y, y2=y)
        yield tag("text", text(frame.y.label(tick)), class_="tick end", x=_short(frame.left - 8), y=y, dy="0.35em")
    yield tag("line", class_="axis", x1=_short(frame.left), x2=_short(frame.right), y1=frame.bottom, y2=frame.bottom)
    free_from = frame.left  # labels never overlap: each starts after the previous one
    for tick in frame.x.ticks:
        label = frame.x.label(tick)
        x, half = float(frame.px(tick)), CHARACTER * len(label) / 2
        yield tag("line", class_="axis", x1=_short(x), x2=_short(x), y1=frame.bottom, y2=frame.bottom + 5)
        if x - half >= free_from - half and x + half <= frame.size.width:
            yield tag("text", text(label), class_="tick middle", x=_short(x), y=frame.bottom + 18)
            free_from = x + half + 10 + half
    yield tag("text", text(chart.x_label), class_="tick end", x=_short(frame.right), y=frame.size.height - 4)
    if frame.y.is_log:
        yield tag("text", "logarithmic", class_="tick", x=4, y=frame.size.height - 4)


def _band(frame: _Frame, line: Line) -> str:
    """Return the band between the minimum and the maximum of each point."""
    points = line.points
    if points.each == 1:
        return ""
    paths = []
    for part in _unbroken(points.x, points.low, points.high):
        upper = [f"{frame.px(x)} {frame.py(high)}" for x, _, high in part]
        lower = [f"{frame.px(x)} {frame.py(low)}" for x, low, _ in reversed(part)]
        paths.append(f"M{'L'.join([*upper, *lower])}Z")
    return tag("path", class_=f"band s{line.colour}", d="".join(paths))


def _line(frame: _Frame, line: Line) -> Iterator[str]:
    points = line.points
    path, dots = [], []
    for part in _unbroken(points.x, points.mean, points.mean):
        places = [(frame.px(x), frame.py(y)) for x, y, _ in part]
        if len(places) == 1:
            dots.append(places[0])
        elif line.style == "steps":
            first, *rest = places
            path.append(f"M{' '.join(first)}" + "".join(f"H{x}V{y}" for x, y in rest))
        else:
            path.append("M" + "L".join(f"{x} {y}" for x, y in places))
        if line.style == "dots":
            dots += places if len(places) > 1 else []
    if path:
        yield tag("path", class_=f"line {line.style} s{line.colour}", d="".join(path))
    for x, y in dots:
        yield tag("circle", class_=f"dot s{line.colour}", cx=x, cy=y, r="3.4")


def _level(frame: _Frame, level: ReferenceLine) -> str:
    y = frame.py(level.value)
    colour = "neutral" if level.colour is None else f"s{level.colour}"
    return tag("line", class_=f"level {colour}", x1=_short(frame.left), x2=_short(frame.right), y1=y, y2=y)


def _marks(frame: _Frame, marks: EventMarks) -> Iterator[str]:
    """Return the marks of updates; those at the same pixel are one mark."""
    inside = (x for x in marks.x if frame.x.low <= x <= frame.x.high)
    for x in sorted({round(float(frame.px(value)), 0) for value in inside}):
        if marks.kind == "resume":
            yield tag("line", class_="resume", x1=x, x2=x, y1=TOP, y2=frame.bottom)
        else:
            base = frame.bottom
            yield tag("path", class_="skip", d=f"M{x} {base - 9}l5 9h-10Z")


def _unbroken(
    x: Iterable[float], low: Iterable[float], high: Iterable[float]
) -> Iterator[list[tuple[float, float, float]]]:
    """Split points into runs without a gap."""
    part: list[tuple[float, float, float]] = []
    for point in zip(x, low, high, strict=True):
        if math.isfinite(point[1]):
            part.append(point)
        elif part:
            yield part
            part = []
    if part:
        yield part


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")
