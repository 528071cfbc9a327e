"""What a run shows: a live line on a terminal, plain lines elsewhere."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from bigbatch.cli.eta import EtaEstimator

if TYPE_CHECKING:
    from bigbatch.lm.training.setup import ProgressCallback

PLAIN_LINES = 20  # lines that a run without a terminal prints about its updates
SAMPLE_LINES = 12
STATUS_COLUMNS = 68  # of a terminal: "update 350/350", loss, speed, time left and memory
NARROWEST_BAR, WIDEST_BAR = 8, 32


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Make a console that neither invents colours nor reads markup or :emoji: in what it is given."""
    return Console(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Keep transformers' own progress bars and advice off the screen."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def progress_display(console: Console | None) -> "Iterator[ProgressCallback]":
    """Show what a preparation is at: one line that changes on a terminal, a line for each kind of work elsewhere.

    Args:
        console: Where to show it; None for nowhere.
    """
    last = ""

    def print_once(words: str, done: int = 0, total: int = 0) -> None:
        nonlocal last
        if console is not None and words != last:
            console.print(f"{words} …")
        last = words

    if console is None or not console.is_terminal:
        yield print_once
        return
    with console.status("starting …") as status:

        def replace(words: str, done: int = 0, total: int = 0) -> None:
            progress = f": {done:,} of {total:,}" if total else ""
            status.update(f"{words}{progress} …")

        yield replace


class TrainingDisplay:
    """Listens to a run and shows it; a context, so that the terminal is left in order.

    Args:
        console: Where to print.
        total_steps: Updates of the run.
        validation_every: Updates between two validations, or None where there is no validation.
        entropy: Unigram entropy of the validation text in nats per token, or None.
        prompt: What samples of text begin with, to tell the model's words from it.
        done: Updates that an earlier process made.
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
    ) -> None:
        self._console = console
        self._total_steps = total_steps
        self._entropy = entropy
        self._prompt = prompt
        self._pace = EtaEstimator(total_steps=total_steps - done, validation_every=validation_every)
        self._progress = Progress(*_columns(console.width), console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("", total=total_steps, completed=done, status="")

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
        status = (
            f"loss {row['loss']:.3f} · {self._pace.tokens_per_s:,.0f} tokens/s · "
            f"{duration(self._pace.left_s)} left · {_gibibytes(row['peak_bytes'])}"
        )
        status += noise(row)
        self._progress.update(self._task, completed=step, status=status)
        every = max(1, self._total_steps // PLAIN_LINES)
        if not self._console.is_terminal and (step == 1 or step % every == 0 or step == self._total_steps):
            self._console.print(f"update {step}/{self._total_steps} · {status}")
        if row["skipped"]:
            self._console.print(f"update {step} was skipped and changed nothing: {row['skipped']}")

    def on_validation(self, step: int, loss: float) -> None:
        """Show a validation loss beside what knowing only token frequencies would reach."""
        self._pace.validated()
        beside = "" if self._entropy is None else f" (token frequencies alone: {self._entropy:.3f})"
        self._console.print(f"update {step}: validation loss {loss:.3f}{beside}")

    def on_sample(self, step: int, text: str) -> None:
        """Show what the model writes, the prompt set off from it where the terminal can."""
        self._pace.paused()
        self._console.print(f"update {step}: the model writes")
        self._console.print(quote(text, self._prompt))


def noise(row: dict[str, Any]) -> str:
    """Say the noise scale of a line of metrics.jsonl, where it is known."""
    scale = row.get("noise_scale_sequences")
    if scale is None:
        return ""
    return f" · noise scale {scale:,.0f} seq" if math.isfinite(scale) else " · noise scale not to be told yet"


def _columns(width: int) -> list[TextColumn | BarColumn]:
    """Lay out the live line: the bar takes what is left of the width, or goes where there is too little."""
    bar = min(WIDEST_BAR, width - STATUS_COLUMNS)
    if bar < NARROWEST_BAR:
        return [TextColumn("{task.completed}/{task.total} · {task.fields[status]}")]
    return [
        TextColumn("update {task.completed}/{task.total}"),
        BarColumn(bar_width=bar),
        TextColumn("{task.fields[status]}"),
    ]


def quote(text: str, prompt: str) -> Text:
    """Set a sample apart from what is around it: its first lines, indented behind a bar, without runs of empty ones."""
    # An untrained model also writes what would move the cursor or ring the bell.
    visible = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    shown = re.sub(r"\n\s*\n(\s*\n)+", "\n\n", visible.rstrip("\ufffd \n"))  # a character may be cut in the middle
    lines = shown.splitlines() or [""]
    if len(lines) > SAMPLE_LINES:
        lines = [*lines[:SAMPLE_LINES], "…"]
    quoted = Text("\n".join(f"    │ {line}" for line in lines), style="dim")
    first = prompt.splitlines()[0] if prompt else ""
    if first and lines[0].startswith(first):
        quoted.stylize("not dim bold", 6, 6 + len(first))
    return quoted


def duration(seconds: float) -> str:
    """Write seconds as 0.4 s, 42 s, 3:07 or 1:02:03."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if 0.05 <= seconds < 9.95 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _gibibytes(peak_bytes: int | None) -> str:
    return "memory unknown" if peak_bytes is None else f"{peak_bytes / 2**30:.2f} GiB"
