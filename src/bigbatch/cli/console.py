"""What a run shows: a live line on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

PLAIN_LINES = 20  # lines that a run without a terminal prints about its updates


def make_console(*, stderr: bool = False) -> Console:
    """Make a console that neither invents colours nor reads markup in what it is given."""
    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Keep transformers' own progress bars and advice off the screen."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class TrainingDisplay:
    """Listens to a run and shows it; a context, so that the terminal is left in order.

    Args:
        console: Where to print.
        total_steps: Updates of the run.
        entropy: Unigram entropy of the validation text in nats per token, or None.
        prompt: What samples of text begin with, to tell the model's words from it.
    """

    def __init__(self, console: Console, *, total_steps: int, entropy: float | None, prompt: str) -> None:
        self._console = console
        self._total_steps = total_steps
        self._entropy = entropy
        self._prompt = prompt
        self._started_s = time.perf_counter()
        self._tokens = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("update", total=total_steps, status="")

    def __enter__(self) -> "TrainingDisplay":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def updated(self, row: dict[str, Any]) -> None:
        """Show loss, speed, time left and memory."""
        self._tokens += row["tokens"]
        elapsed_s = time.perf_counter() - self._started_s
        step = row["step"]
        left_s = elapsed_s / step * (self._total_steps - step)
        status = (
            f"loss {row['loss']:.3f} · {self._tokens / elapsed_s:,.0f} tokens/s · {duration(left_s)} left · "
            f"{_gibibytes(row['peak_bytes'])}"
        )
        self._progress.update(self._task, completed=step, status=status)
        every = max(1, self._total_steps // PLAIN_LINES)
        if not self._console.is_terminal and (step == 1 or step % every == 0 or step == self._total_steps):
            self._console.print(f"update {step}/{self._total_steps} · {status}")
        if row["skipped"]:
            self._console.print(f"update {step} was skipped and changed nothing: {row['skipped']}")

    def validated(self, step: int, loss: float) -> None:
        """Show a validation loss beside what knowing only token frequencies would reach."""
        beside = "" if self._entropy is None else f" (token frequencies alone: {self._entropy:.3f})"
        self._console.print(f"update {step}: validation loss {loss:.3f}{beside}")

    def sampled(self, step: int, text: str) -> None:
        """Show what the model writes."""
        shown = Text("\n".join(f"    │ {line}" for line in text.rstrip().splitlines()), style="dim")
        self._console.print(shown)


def duration(seconds: float) -> str:
    """Write seconds as 42 s, 3:07 or 1:02:03."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _gibibytes(peak_bytes: int | None) -> str:
    return "memory unknown" if peak_bytes is None else f"{peak_bytes / 2**30:.2f} GiB"


def warn(message: str) -> None:
    """Print a line to stderr."""
    print(message, file=sys.stderr, flush=True)
