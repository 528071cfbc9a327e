"""Drawing of a window: a bar per micro-batch with a block per sample, followed by its padding."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigbatch.lm.report.html import tag, text
from bigbatch.lm.report.svg_chart import CHARACTER, SIZES, Size

ROW, BAR, HEAD = 24, 16, 26  # pixels
FEWEST_PIXELS = 3.0  # average width of a block; below that, the samples of a bar are drawn as one block


@dataclass(frozen=True)
class WindowLayout:
    """Micro-batches of the first window of a run.

    Attributes:
        layout: ``padded`` or ``packed``.
        token_budget: Largest number of tokens in a micro-batch; None if samples are the limit.
        num_samples: Samples of the window.
        tokens: Tokens of the window without padding.
        laid_out_tokens: Tokens of the window with padding.
        num_microbatches: Micro-batches of the window.
        first: Tokens of each sample of the first micro-batches.
        last: Tokens of each sample of the last micro-batches; those in between are not recorded.
        noun: What a sample is.
    """

    layout: str
    token_budget: int | None
    num_samples: int
    tokens: int
    laid_out_tokens: int
    num_microbatches: int
    first: tuple[tuple[int, ...], ...]
    last: tuple[tuple[int, ...], ...]
    noun: str = "sequence"

    @property
    def shown(self) -> list[tuple[int, tuple[int, ...]]]:
        """The micro-batches that are drawn, numbered from 1."""
        end = self.num_microbatches - len(self.last)
        return [*enumerate(self.first, 1), *enumerate(self.last, end + 1)]

    @property
    def num_hidden(self) -> int:
        """Number of micro-batches that are not drawn."""
        return self.num_microbatches - len(self.first) - len(self.last)

    def laid_out(self, lengths: Sequence[int]) -> int:
        """Return the tokens of a micro-batch with padding."""
        return sum(lengths) if self.layout == "packed" else len(lengths) * max(lengths)

    @property
    def scale(self) -> int:
        """Tokens at the full width of the drawing."""
        return max(self.token_budget or 0, *(self.laid_out(lengths) for _, lengths in self.shown))

    def describe(self) -> str:
        """Return a sentence about the window."""
        budget = "" if self.token_budget is None else f" of at most {self.token_budget:,} tokens"
        padding = self.laid_out_tokens - self.tokens
        share = padding / self.laid_out_tokens
        waste = f"{padding:,} of {self.laid_out_tokens:,} tokens are padding ({share:.1%})" if padding else "no padding"
        batches = "1 micro-batch" if self.num_microbatches == 1 else f"{self.num_microbatches:,} micro-batches"
        return (
            f"{self.num_samples:,} {self.noun}s, {self.tokens:,} tokens, in {batches}{budget}, {self.layout}: {waste}."
        )


def window_of(recorded: object, *, noun: str = "sequence") -> WindowLayout | None:
    """Return the window that an event has recorded; None if it cannot be drawn."""
    if not isinstance(recorded, Mapping):
        return None
    try:
        first, last = _microbatches(recorded["first"]), _microbatches(recorded["last"])
        budget = recorded["token_budget"]
        window = WindowLayout(
            layout=str(recorded["layout"]),
            token_budget=None if budget is None else _count(budget),
            num_samples=_count(recorded["num_samples"]),
            tokens=_count(recorded["tokens"]),
            laid_out_tokens=_count(recorded["laid_out_tokens"]),
            num_microbatches=_count(recorded["num_microbatches"]),
            first=first,
            last=last,
            noun=noun,
        )
    except (KeyError, TypeError, ValueError):
        return None
    return window if first and window.num_hidden >= 0 else None


def _microbatches(recorded: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(_count(length) for length in lengths) for lengths in recorded if lengths)


def _count(value: object) -> int:
    if type(value) is not int or not 0 < value < 2**53:
        raise ValueError
    return value


def draw_window(window: WindowLayout) -> str:
    """Return a window as SVG in every width."""
    return "".join(_draw(window, size) for size in SIZES)


def _draw(window: WindowLayout, size: Size) -> str:
    rows = len(window.shown) + bool(window.num_hidden)
    budget = window.token_budget
    height = HEAD + rows * ROW + 6
    number_width = 10 + CHARACTER * len(f"{window.num_microbatches:,}")
    words = [_words(window, lengths, short=False) for _, lengths in window.shown]
    is_short = size.name == "narrow" or 10 + CHARACTER * max(map(len, words)) > size.width / 2
    words = [_words(window, lengths, short=True) for _, lengths in window.shown] if is_short else words
    left, right = number_width, size.width - 10 - CHARACTER * max(map(len, words))
    unit = (right - left) / window.scale
    parts = [*_head(window, left, right, unit, height, budget)]
    y = float(HEAD)
    for place, (number, lengths) in enumerate(window.shown):
        if window.num_hidden and place == len(window.first):
            hidden = f"… {window.num_hidden:,} more"
            parts.append(tag("text", text(hidden), class_="tick", x=left, y=y + BAR - 3))
            y += ROW
        parts += _bar(window, number, lengths, words[place], left=left, right=right, y=y, unit=unit)
        y += ROW
    name = f"window-{size.name}"
    return tag(
        "svg",
        tag("title", "Plan of the first window", id=f"{name}-title")
        + tag("desc", text(window.describe()), id=f"{name}-desc")
        + "".join(parts),
        class_=f"plot {size.name}",
        viewBox=f"0 0 {size.width} {height}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )


def _head(
    window: WindowLayout, left: float, right: float, unit: float, height: float, budget: int | None
) -> Iterator[str]:
    yield tag("text", "0", class_="tick", x=left, y=14)
    end = left + unit * (budget or window.scale)
    label = f"{budget:,} tokens at most" if budget else f"{window.scale:,} tokens"
    yield tag("text", text(label), class_="tick end", x=_short(end), y=14)
    yield tag("line", class_="capacity", x1=_short(end), x2=_short(end), y1=HEAD - 6, y2=height - 4)


def _words(window: WindowLayout, lengths: tuple[int, ...], *, short: bool) -> str:
    """Return the text next to a bar."""
    tokens, laid_out = sum(lengths), window.laid_out(lengths)
    if short:
        return f"{len(lengths):,} × {max(lengths):,}"
    samples = window.noun if len(lengths) == 1 else f"{window.noun}s"
    full = f", {tokens / laid_out:.0%} full" if window.layout == "padded" and tokens != laid_out else ""
    return f"{len(lengths):,} {samples}, {tokens:,} tokens{full}"


def _bar(
    window: WindowLayout,
    number: int,
    lengths: tuple[int, ...],
    words: str,
    *,
    left: float,
    right: float,
    y: float,
    unit: float,
) -> Iterator[str]:
    middle = y + BAR / 2
    yield tag("text", f"{number:,}", class_="tick end", x=_short(left - 7), y=middle, dy="0.35em")
    yield from _samples(window, lengths, left, y, unit)
    yield tag("text", text(words), class_="tick", x=_short(right + 10), y=middle, dy="0.35em")


def _samples(window: WindowLayout, lengths: tuple[int, ...], left: float, y: float, unit: float) -> Iterator[str]:
    """Return the blocks of a bar: each sample followed by its padding, or one block if they are too narrow to see."""
    laid_out = window.laid_out(lengths)
    if laid_out * unit / len(lengths) < FEWEST_PIXELS:
        yield _block("even", left, y, sum(lengths) * unit)
        if laid_out > sum(lengths):
            yield _block("padding", left + sum(lengths) * unit, y, (laid_out - sum(lengths)) * unit)
        return
    width = laid_out / len(lengths) if window.layout == "padded" else 0
    x = left
    for place, length in enumerate(lengths):
        yield _block("odd" if place % 2 else "even", x, y, length * unit)
        if width > length:
            yield _block("padding", x + length * unit, y, (width - length) * unit)
        x += max(width, length) * unit


def _block(kind: str, x: float, y: float, width: float) -> str:
    gap = 1.0 if width > 3 else 0.0
    return tag("rect", class_=kind, x=_short(x), y=_short(y), width=_short(max(width - gap, 0.5)), height=BAR)


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")
