"""Console output of a run: a live line on a terminal, plain lines elsewhere.

Every text passes through `OutputConsole`, `quote` or the live lines here, which escape control characters.
"""

import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.text import Text

from bigbatch.cli.eta import EtaEstimator
from bigbatch.cli.output import visible, wrap
from bigbatch.lm.training.callbacks import perplexity
from bigbatch.lm.training.library_output import silence_libraries

if TYPE_CHECKING:
    from bigbatch.lm.training.setup import ProgressCallback

PLAIN_LINES = 20  # approximate number of update lines per run without a terminal
SAMPLE_LINES = 12
BAR = "    │ "  # in front of every line of a sample
NARROWEST_BAR, WIDEST_BAR = 8, 32
BAR_COLUMNS = 80  # terminal columns from which the live line has a bar
STATUS_COLUMNS = 94  # terminal columns for the update, loss, speed, time left, memory and noise scale


class OutputConsole(Console):
    """A console for lines of text: without markup, highlighting or :emoji: codes, and without control characters.

    On a terminal, lines are broken at spaces, not within words.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, soft_wrap=True, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print each text as one line; other renderables as rich prints them."""
        super().print(*(self._line(text) if isinstance(text, str) else text for text in objects), **options)

    def print_unbroken(self, *lines: str) -> None:
        """Print lines that must not be broken, such as commands to copy and JSON."""
        for line in lines:
            super().print(visible(line))

    def _line(self, text: str) -> str:
        line = visible(text)
        is_json = line.startswith("{")  # a break within a string would make it invalid
        return wrap(line, self.width) if self.is_terminal and not is_json else line


def make_console(*, stderr: bool = False, quiet: bool = False) -> OutputConsole:
    """Return a console for stdout or stderr."""
    return OutputConsole(stderr=stderr, quiet=quiet)


def quiet_libraries() -> None:
    """Disable the output of libraries until the command ends."""
    silence_libraries()


@contextmanager
def progress_display(console: Console | None) -> "Iterator[ProgressCallback]":
    """Yield a callback that shows progress: one live line on a terminal, one line per kind of work elsewhere.

    Args:
        console: Output console; None for no output.
    """
    last = ""

    def print_once(activity: str, done: int = 0, total: int = 0) -> None:
        nonlocal last
        if console is not None and activity != last:
            console.print(f"{activity} …")
        last = activity

    if console is None or not console.is_terminal:
        yield print_once
        return
    # Spinners of other encodings than UTF-8 have no braille characters.
    with console.status("starting …", spinner="dots" if console.encoding.startswith("utf") else "line") as status:

        def replace(activity: str, done: int = 0, total: int = 0) -> None:
            progress = f": {done:,} of {total:,} …" if total else f": {done:,} …" if done else " …"
            status.update(Text(f"{_cut(visible(activity), console.width - len(progress) - 3)}{progress}"))

        yield replace


class TrainingDisplay:
    """Training callback that displays a run; a context manager that restores the terminal on exit.

    Args:
        console: Output console.
        total_steps: Updates of the run.
        validation_every: Updates between two validations, or None without validation.
        entropy: Unigram entropy of the validation text in nats per token, or None.
        prompt: Start of the text samples, highlighted in the output.
        done: Updates made before this process started.
        has_perplexity: Whether the loss is that of tokens.
        since_start_s: Returns the seconds since the command began, shown after the first update; None for no line.
    """

    def __init__(
        self,
        console: Console,
        *,
        total_steps: int,
        validation_every: int | None,
        entropy: float | None,
        prompt: str,
        done: int = 0,
        has_perplexity: bool = True,
        since_start_s: Callable[[], float] | None = None,
    ) -> None:
        self._has_perplexity = has_perplexity
        self._since_start_s = since_start_s
        self._console = console
        self._total_steps = total_steps
        self._entropy = entropy
        self._prompt = prompt
        self._pace = EtaEstimator(total_steps=total_steps - done, validation_every=validation_every)
        self._progress = Progress(*_columns(console), console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("", total=total_steps, completed=done, parts=())

    def __enter__(self) -> "TrainingDisplay":
        self._progress.start()
        self._pace.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def on_update(self, row: dict[str, Any]) -> None:
        """Show loss, speed, time left and memory."""
        self._pace.updated(row["tokens"])
        step = row["step"]
        parts = (
            f"loss {row['loss']:.3f}",
            *([f"accuracy {row['accuracy']:.2f}"] if "accuracy" in row else []),
            f"{self._pace.tokens_per_s:,.0f} tokens/s",
            f"{duration(self._pace.left_s)} left",
            _gibibytes(row["peak_bytes"]),
            *noise(row),
        )
        self._progress.update(self._task, completed=step, parts=parts)
        every = max(1, self._total_steps // PLAIN_LINES)
        if not self._console.is_terminal and (step == 1 or step % every == 0 or step == self._total_steps):
            self._console.print(" · ".join([f"update {step}/{self._total_steps}", *parts]))
        if self._since_start_s is not None:
            self._console.print(f"first update {duration(self._since_start_s())} after the start of the command")
            self._since_start_s = None
        if row["skipped"]:
            self._console.print(f"update {step} was skipped and changed nothing: {row['skipped']}")

    def on_validation(self, step: int, loss: float) -> None:
        """Show a validation loss next to the unigram baseline (the loss of predicting token frequencies only)."""
        self._pace.validated()
        baseline = "" if self._entropy is None else f" (unigram baseline: loss {self._entropy:.3f})"
        shown = f", perplexity {perplexity(loss):,.4g}" if self._has_perplexity else ""
        self._console.print(f"update {step}: validation loss {loss:.3f}{shown}{baseline}")

    def on_evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Show the losses of named sets."""
        parts = (f"{name} {loss:.3f} (perplexity {perplexity(loss):,.4g})" for name, loss in losses.items())
        self._console.print(f"update {step}: validation loss of {', '.join(parts)}")

    def on_validation_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a validation of pairs."""
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in metrics.items())
        self._console.print(f"update {step}: validation {shown}")

    def on_sample(self, step: int, text: str) -> None:
        """Show a text sample, with the prompt in bold on a terminal."""
        self._pace.paused()
        self._console.print(f"update {step}: sample from the model")
        width = self._console.width if self._console.is_terminal else None
        self._console.print(quote(text, self._prompt, width=width))


def noise(row: dict[str, Any]) -> list[str]:
    """Format the noise scale of a row of metrics.jsonl; empty if it was not measured."""
    scale = row.get("noise_scale_sequences")
    if scale is None:
        return []
    return [f"noise scale {scale:,.0f} seq" if math.isfinite(scale) else "noise scale not measurable yet"]


class LiveLine(ProgressColumn):
    """Column with the number of the update and the parts of its status that fit in one line of the terminal.

    Args:
        console: Its current width counts.
        reserved: Columns of the line that other columns need.
    """

    def __init__(self, console: Console, reserved: int) -> None:
        super().__init__()
        self._console = console
        self._reserved = reserved

    def render(self, task: Task) -> Text:
        """Return the line without the parts that do not fit; the number of the update is always there."""
        width = self._console.width - self._reserved
        line = f"update {task.completed:.0f}/{task.total or 0:.0f}"
        if len(line) > width:
            line = line.removeprefix("update ")
        parts: list[str] = list(task.fields["parts"])
        while parts and len(" · ".join([line, *parts])) > width:
            parts.pop(1 if len(parts) == 3 else -1)  # the speed before the time left
        return Text(" · ".join([line, *parts]), no_wrap=True, overflow="ignore")


def _columns(console: Console) -> list[ProgressColumn]:
    """Return the columns of the live line; a narrow terminal has no bar."""
    if console.width < BAR_COLUMNS:
        return [LiveLine(console, reserved=0)]
    bar = max(NARROWEST_BAR, min(WIDEST_BAR, console.width - STATUS_COLUMNS))
    return [BarColumn(bar_width=bar), LiveLine(console, reserved=bar + 1)]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(0, width - 1)]}…"


def quote(text: str, prompt: str, *, width: int | None = None) -> Text:
    """Format a sample: its first lines, indented behind a bar, with consecutive empty lines merged.

    Args:
        text: As generated.
        prompt: Its start, which is highlighted if it is at the beginning of the first line.
        width: Columns to break lines at; None to not break them.
    """
    clean = visible(text.rstrip("\ufffd \n"), keep="\n\t")  # the last character may be incomplete
    shown = re.sub(r"\n\s*\n(\s*\n)+", "\n\n", clean)
    lines = shown.split("\n")
    if len(lines) > SAMPLE_LINES:
        lines = [*lines[:SAMPLE_LINES], "…"]
    if width is not None:
        lines = [part for line in lines for part in _broken(line, width - len(BAR))]
    quoted = Text("\n".join(f"{BAR}{line}" for line in lines), style="dim")
    first = visible(prompt.split("\n")[0], keep="\t")
    if first and lines[0].startswith(first):
        quoted.stylize("not dim bold", len(BAR), len(BAR) + len(first))
    return quoted


def _broken(line: str, width: int) -> list[str]:
    """Break a line of a sample at spaces, and a longer word anywhere: the bar is on every line."""
    return textwrap.wrap(line, max(width, 10), replace_whitespace=False, break_on_hyphens=False) or [line]


def duration(seconds: float) -> str:
    """Format seconds as 0.4 s, 42 s, 3:07 or 1:02:03."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if 0.05 <= seconds < 9.95 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _gibibytes(peak_bytes: int | None) -> str:
    return "memory unknown" if peak_bytes is None else f"{peak_bytes / 2**30:.2f} GiB"
