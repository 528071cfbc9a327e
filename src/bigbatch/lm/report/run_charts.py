"""The charts of a page: one for each quantity in the metrics, with a summary in words.

One run: a colour per quantity. Several runs: a colour per run, and dashes or dots per quantity.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from bigbatch.lm.report.axes import Kind, number
from bigbatch.lm.report.run_reader import Run
from bigbatch.lm.report.svg_chart import Chart, EventMarks, Line, ReferenceLine

FAR = 20.0  # times outside the values, a reference line would flatten the curve and is only mentioned


class RunCharts:
    """The charts of some runs.

    Args:
        runs: At least one.
        names: Distinct names of the runs.
    """

    def __init__(self, runs: Sequence[Run], names: Sequence[str]) -> None:
        self._runs = runs
        self._names = names
        self._alone = len(runs) == 1

    def learning(self) -> list[Chart]:
        """Return the charts of loss, learning rate and gradient norm."""
        return [chart for chart in (self._loss(), self._by_tokens(), self._rate(), self._norm()) if chart]

    def batch(self) -> list[Chart]:
        """Return the chart of the noise scale and the batch size, or of the batch size if it changed."""
        return [chart for chart in (self._noise() or self._global_batch(),) if chart]

    def cost(self) -> list[Chart]:
        """Return the charts of speed, memory and ranks."""
        return [chart for chart in (self._speed(), self._memory(), self._ranks()) if chart]

    def _loss(self) -> Chart | None:
        lines = self._lines("loss", "training") + self._lines("validation_loss", "validation", 1, style="dots")
        if not lines:
            return None
        summary = self._describe_range("loss", "The training loss")
        for run, name in self._each_with("validation_loss"):
            values = [(y, x) for x, y in zip(run.columns.steps, run.columns["validation_loss"], strict=True) if y == y]
            best, step = min(values)
            summary += f" The validation loss{self._of(name)} has its minimum, {number(best)}, at update {step:,}"
            summary += f", and {number(values[-1][0])} at the last validation." if values[-1][1] != step else "."
        marks = self._marks() if self._alone else ()
        return Chart("loss", "Loss", "nats per token", tuple(lines), marks=marks, summary=summary, wide=True)

    def _by_tokens(self) -> Chart | None:
        """Return the loss over the trained tokens, if the batches of the runs differ in size."""
        with_both = [run for run, _ in self._each_with("loss") if run.columns.has("tokens")]
        means = [_mean(run.columns["tokens"]) for run in with_both]
        if len(means) < 2 or max(means) <= 1.05 * min(means):
            return None
        lines = []
        for place, (run, name) in enumerate(zip(self._runs, self._names, strict=True)):
            if run in with_both:
                tokens = list(accumulate(0.0 if math.isnan(y) else y for y in run.columns["tokens"]))
                lines.append(Line(name, tokens, run.columns["loss"], place))
        summary = "The same losses over the trained tokens, because the batches of the runs differ in size."
        return Chart(
            "loss-by-tokens",
            "Loss by tokens",
            "nats per token",
            tuple(lines),
            x_label="tokens",
            summary=summary,
            wide=True,
        )

    def _rate(self) -> Chart | None:
        lines = self._lines("lr", "learning rate")
        if not lines:
            return None
        parts = []
        for run, name in self._each_with("lr"):
            steps, rates = run.columns.finite("lr")
            top, step = float(rates.max()), int(steps[rates.argmax()])
            last = number(run.columns.last("lr"))
            parts.append(
                f"The learning rate{self._of(name)} has its maximum, {number(top)}, at update {step:,} and is {last} "
                "at the end."
            )
        return Chart("lr", "Learning rate", "", tuple(lines), from_zero=True, summary=" ".join(parts))

    def _norm(self) -> Chart | None:
        lines = self._lines("grad_norm", "gradient norm")
        if not lines:
            return None
        summary = self._describe_range("grad_norm", "The norm of the gradient of the whole batch, before clipping,")
        limits = {
            limit for run, _ in self._each_with("grad_norm") if (limit := _positive(run.settings, "max_grad_norm"))
        }
        levels: tuple[ReferenceLine, ...] = ()
        if len(limits) == 1:
            limit = limits.pop()
            levels = self._near([ReferenceLine("clipped above", limit)], lines)
            for run, name in self._each_with("grad_norm"):
                _, norms = run.columns.finite("grad_norm")
                share = float((norms > limit).mean())
                summary += f" {number(share, 'share')} of the updates{self._of(name)} were clipped to {number(limit)}."
        return Chart("grad-norm", "Gradient norm", "before clipping", tuple(lines), levels, summary=summary)

    def _noise(self) -> Chart | None:
        noise = self._lines("noise_scale_items", "noise scale")
        if not noise:
            return None
        batch = self._lines("items", "batch", 1, style="dashed")
        parts = []
        for run, name in self._each_with("noise_scale_items"):
            last, items = run.columns.last("noise_scale_items"), run.columns.last("items")
            word = f"The gradient noise scale{self._of(name)} is {number(last, 'count')} items at the end"
            if last and items and last > 0 and items > 0:
                ratio = last / items
                word += f", {number(ratio)} times the batch of {number(items, 'count')}"
                word += ": larger batches would " + ("need fewer updates" if ratio > 1 else "save few updates")
            parts.append(f"{word}.")
        return Chart(
            "noise",
            "Noise scale against the batch",
            "items",
            (*batch, *noise),
            kind="count",
            summary=" ".join(parts),
            wide=True,
        )

    def _global_batch(self) -> Chart | None:
        varies = [run for run, _ in self._each_with("global_batch") if len(_distinct(run.columns["global_batch"])) > 1]
        if not varies:
            return None
        lines = self._lines("global_batch", "global batch", style="steps")
        return Chart("global-batch", "Global batch", "", tuple(lines), kind="count", from_zero=True, wide=True,
                     summary=self._describe_range("global_batch", "The global batch"))  # fmt: skip

    def _speed(self) -> Chart | None:
        lines = self._lines("tokens_per_s", "tokens/s")
        if not lines:
            return None
        parts = [
            f"Median throughput{self._of(name)}: {number(_median(run.columns['tokens_per_s']), 'count')} tokens/s."
            for run, name in self._each_with("tokens_per_s")
        ]
        return Chart("speed", "Speed", "tokens/s", tuple(lines), kind="count", from_zero=True, summary=" ".join(parts))

    def _memory(self) -> Chart | None:
        lines = self._lines("peak_bytes", "measured")
        if not lines:
            return None
        levels, parts = [], []
        for place, (run, name) in enumerate(zip(self._runs, self._names, strict=True)):
            if not run.columns.has("peak_bytes"):
                continue
            measured = float(run.columns.finite("peak_bytes")[1].max())
            predicted = _positive(run.choice, "peak_bytes")
            parts.append(_about_memory(run, self._of(name), measured, predicted))
            if predicted is not None:
                colour = 1 if self._alone else place
                levels.append(ReferenceLine("predicted" if self._alone else f"{name}: predicted", predicted, colour))
        return Chart(
            "memory",
            "Memory",
            "highest so far",
            tuple(lines),
            tuple(levels),
            kind="bytes",
            from_zero=True,
            summary=" ".join(parts),
        )

    def _ranks(self) -> Chart | None:
        lines = self._lines("slowest_share", "slowest rank")
        if not lines:
            return None
        parts = []
        for run, name in self._each_with("slowest_share"):
            slowest = Counter(run.columns.finite("slowest_rank")[1].astype(int).tolist()).most_common(1)
            most_often = f" Rank {slowest[0][0]} is the slowest most often." if slowest else ""
            ranks = number(run.columns.last("ranks"), "count")
            half = number(_median(run.columns["slowest_share"]), "share")
            parts.append(f"Of {ranks} ranks{self._of(name)}, the slowest has a median share of {half}.{most_often}")
        return Chart("ranks", "The slowest rank", "share", tuple(lines), kind="share", summary=" ".join(parts))

    def _lines(self, column: str, what: str, colour: int = 0, *, style: str = "line") -> list[Line]:
        found = []
        for place, (run, name) in enumerate(zip(self._runs, self._names, strict=True)):
            if run.columns.has(column):
                label, painted = (what, colour) if self._alone else (f"{name}: {what}", place)
                found.append(Line(label, run.columns.steps, run.columns[column], painted, style))  # type: ignore[arg-type]
        return found

    def _marks(self) -> tuple[EventMarks, ...]:
        run = self._runs[0]
        skipped = EventMarks("skipped update", "skip", [skip.step for skip in run.columns.skipped])
        resumed = EventMarks(
            "resumed", "resume", [event["step"] for event in run.resumes if type(event.get("step")) is int]
        )
        return tuple(marks for marks in (skipped, resumed) if marks.x)

    def _each_with(self, column: str) -> list[tuple[Run, str]]:
        return [pair for pair in zip(self._runs, self._names, strict=True) if pair[0].columns.has(column)]

    def _of(self, name: str) -> str:
        return "" if self._alone else f" of {name}"

    def _describe_range(self, column: str, subject: str, kind: Kind = "plain") -> str:
        """Return a sentence about the first, last, minimum and maximum value of each run."""
        parts = []
        for run, name in self._each_with(column):
            steps, values = run.columns.finite(column)
            begin, end, lowest = int(steps[0]), int(steps[-1]), int(steps[values.argmin()])
            highest = int(steps[len(values) - 1 - values[::-1].argmax()])
            first, last, low, high = (float(value) for value in (values[0], values[-1], values.min(), values.max()))
            parts.append(
                f"{subject}{self._of(name)} is {number(first, kind)} at update {begin:,} and {number(last, kind)} at "
                f"update {end:,}; minimum at {lowest:,} ({number(low, kind)}), maximum at {highest:,} "
                f"({number(high, kind)})."
            )
        return " ".join(parts)

    @staticmethod
    def _near(levels: list[ReferenceLine], lines: list[Line]) -> tuple[ReferenceLine, ...]:
        values = [value for line in lines for value in line.points.finite]
        low, high = min(values), max(values)
        return tuple(level for level in levels if low / FAR <= level.value <= high * FAR)


def _about_memory(run: Run, of: str, measured: float, predicted: float | None) -> str:
    """Return a sentence that compares measured and predicted memory; on the CPU the two differ in scope."""
    word = f"The measured peak{of} is {number(measured, 'bytes')}"
    if predicted is None:
        return f"{word}; there is no prediction, because the micro-batch was set."
    device = run.last_event_value("device") or str(run.settings.get("device", ""))
    if str(device).startswith("cuda"):
        off = measured / predicted - 1
        more = "more" if off >= 0 else "less"
        return f"{word}, {number(abs(off), 'share')} {more} than the predicted {number(predicted, 'bytes')}."
    return (
        f"{word}: on the CPU this is the whole process with Python and libraries. The prediction of "
        f"{number(predicted, 'bytes')} covers only the tensors of an update."
    )


def _positive(values: object, key: str) -> float | None:
    value = values.get(key) if hasattr(values, "get") else None
    return float(value) if type(value) in (int, float) and 0 < value < 1e300 else None  # type: ignore[operator, arg-type]


def _distinct(values: Sequence[float]) -> set[float]:
    return {value for value in np.unique(np.asarray(values, np.float64)).tolist() if value == value}


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if value == value]
    return math.fsum(finite) / len(finite)


def _median(values: Sequence[float]) -> float:
    array = np.asarray(values, np.float64)
    finite = array[~np.isnan(array)]
    return float(np.partition(finite, len(finite) // 2)[len(finite) // 2]) if len(finite) else math.nan


def median(run: Run, column: str) -> float:
    """Return the median of a column (upper of the middle two); NaN if it is empty."""
    return _median(run.columns[column])
