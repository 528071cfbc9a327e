"""The charts of a page: one for each quantity in the metrics, with a summary in words.

One run: a colour per quantity. Several runs: a colour per run, and dashes or dots per quantity.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from bigbatch.lm.report.axes import Kind, number
from bigbatch.lm.report.memory_prediction import MemoryPrediction, positive
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
        """Return the charts of loss, accuracy, margin, learning rate and gradient norm."""
        charts = (self._loss(), self._by_tokens(), self._accuracy(), self._margin(), self._rate(), self._norm())
        return [chart for chart in charts if chart]

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
            perplexity = run.columns.lowest("validation_perplexity")
            summary += f" The validation loss{self._of(name)} has its minimum, {number(best)}, at update {step:,}"
            summary += f" (perplexity {number(perplexity)})" if perplexity is not None else ""
            summary += f", and {number(values[-1][0])} at the last validation." if values[-1][1] != step else "."
        marks = self._marks() if self._alone else ()
        return Chart("loss", "Loss", self._loss_unit, tuple(lines), marks=marks, summary=summary, wide=True)

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
            self._loss_unit,
            tuple(lines),
            x_label="tokens",
            summary=summary,
            wide=True,
        )

    def _accuracy(self) -> Chart | None:
        return self._of_pairs("accuracy", "Accuracy", "of the pairs or examples", kind="share")

    def _margin(self) -> Chart | None:
        return self._of_pairs("margin", "Margin", "of the chosen over the rejected answer")

    def _of_pairs(self, column: str, title: str, unit: str, *, kind: Kind = "plain") -> Chart | None:
        """Return the chart of a metric of pairs, in training and validation."""
        lines = self._lines(column, "training") + self._lines(f"validation_{column}", "validation", 1, style="dots")
        if not lines:
            return None
        parts = []
        for run, name in self._each_with(column):
            last = number(run.columns.last(column), kind)
            parts.append(f"The {column}{self._of(name)} in training is {last} at the end.")
        for run, name in self._each_with(f"validation_{column}"):
            values = run.columns[f"validation_{column}"]
            best, step = max((y, -x) for x, y in zip(run.columns.steps, values, strict=True) if y == y)
            parts.append(
                f"The validation {column}{self._of(name)} has its maximum, {number(best, kind)}, at update {-step:,}, "
                f"and is {number(run.columns.last(f'validation_{column}'), kind)} at the last validation."
            )
        return Chart(column, title, unit, tuple(lines), kind=kind, summary=" ".join(parts))

    @property
    def _loss_unit(self) -> str:
        units = {run.loss_unit for run in self._runs}
        return units.pop() if len(units) == 1 else ""

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
            limit for run, _ in self._each_with("grad_norm") if (limit := positive(run.settings, "max_grad_norm"))
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
        """Return the noise scale and the batch in sequences; in items, as old runs have it, if any lacks sequences."""
        measured = [run.columns for run, _ in self._each_with("noise_scale_items")]
        has_sequences = all(columns.has("noise_scale_sequences") and columns.has("sequences") for columns in measured)
        scale, size, unit = "noise_scale_items", "items", "items"
        if has_sequences:
            scale, size = "noise_scale_sequences", "sequences"
            nouns = {run.noun for run in self._runs}
            unit = f"{nouns.pop()}s" if len(nouns) == 1 else "samples"
        noise = self._lines(scale, "noise scale")
        if not noise:
            return None
        batch = self._lines(size, "batch", 1, style="dashed")
        parts = []
        for run, name in self._each_with(scale):
            last, items = run.columns.last(scale), run.columns.last(size)
            low, high = run.columns["noise_low_sequences"][-1], run.columns["noise_high_sequences"][-1]
            within = f" (interval: {number(low, 'count')} to {number(high, 'count') if high == high else 'unlimited'})"
            parts.append(
                f"The estimate of the gradient noise scale{self._of(name)} is {number(last, 'count')} {unit} at the end"
                f"{within if has_sequences and low == low else ''}; the last batch has {number(items, 'count')}."
            )
        return Chart(
            "noise",
            "Noise scale and batch",
            unit,
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
            found = MemoryPrediction.of(run)
            parts.append(found.describe(self._of(name)))
            if found.expected_bytes is not None:
                label = found.label if self._alone else f"{name}: {found.label}"
                levels.append(ReferenceLine(label, found.expected_bytes, 1 if self._alone else place))
        unit = "highest so far" if all(run.is_on_cuda for run in self._runs) else "of the process, highest so far"
        return Chart(
            "memory",
            "Memory",
            unit,
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
