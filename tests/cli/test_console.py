"""What a run shows, on a terminal and off it."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from bigbatch.cli.console import TrainingDisplay, duration, make_console, progress_display, quote
from bigbatch.cli.eta import EtaEstimator


def row(step: int, **changes: Any) -> dict[str, Any]:
    return {"step": step, "loss": 2.5, "tokens": 1, "peak_bytes": 2**30, "skipped": None} | changes


def shown(*, terminal: bool, width: int = 100, total_steps: int = 100, skipped: int = 0) -> str:
    """What a run of that many updates prints, with a validation at half of them and a sample at the end."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, soft_wrap=True, highlight=False, markup=False)
    half = max(1, total_steps // 2)
    with TrainingDisplay(
        console, total_steps=total_steps, validation_every=half, entropy=6.5, prompt="def "
    ) as display:
        for step in range(1, total_steps + 1):
            display.on_update(row(step, skipped="no items" if step == skipped else None))
            if step == half:
                display.on_validation(step, 3.25)
        display.on_sample(total_steps, "def [red]f():\n    pass")
    return out.getvalue()


def test_output_without_terminal_has_about_twenty_lines() -> None:
    printed = shown(terminal=False)
    lines = [line for line in printed.splitlines() if re.match(r"update \d+/100 · ", line)]
    assert len(lines) == 21  # the first, and every fifth
    assert re.fullmatch(r"update 1/100 · loss 2\.500 · [\d,]+ tokens/s · .+ left · 1\.00 GiB", lines[0])
    assert "\nupdate 50: validation loss 3.250 (unigram baseline: 6.500)\n" in printed
    assert printed.endswith("update 100: sample from the model\n    │ def [red]f():\n    │     pass\n")
    assert "\x1b" not in printed


@pytest.mark.parametrize("width", [20, 60, 80, 120, 300])
def test_live_line_fits_terminal(width: int) -> None:
    printed = shown(terminal=True, width=width)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed)
    live = [line for line in re.split(r"[\r\n]", plain) if re.match(r"(update )?\d+/100 ", line)]
    assert live
    assert max(map(len, live)) <= width
    assert ("━" in plain) == (width >= 80)
    if width >= 60:
        assert "loss 2.500 · " in live[-1]
    if width >= 80:
        assert live[-1].rstrip().endswith("GiB")


def test_skipped_update_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert "update 7 was skipped and changed nothing: no items\n" in shown(terminal=False, skipped=7)
    assert "update 7 was skipped and changed nothing: no items" in shown(terminal=True, skipped=7)


def test_run_of_one_update_shows_it_once() -> None:
    assert shown(terminal=False, total_steps=1).count("update 1/1 · ") == 1


def test_unknown_memory_is_reported() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=100)
    with TrainingDisplay(console, total_steps=1, validation_every=None, entropy=None, prompt="") as display:
        display.on_update(row(1, peak_bytes=None))
        display.on_validation(1, 3.0)
    assert "memory unknown" in out.getvalue()
    assert "validation loss 3.000\n" in out.getvalue()


def test_setup_without_terminal_prints_each_stage_once() -> None:
    out = io.StringIO()
    with progress_display(Console(file=out, force_terminal=False)) as say:
        say("reading a")
        say("encoding")
        say("encoding", 5, 10)
    assert out.getvalue() == "reading a …\nencoding …\n"


def test_setup_on_terminal_shows_progress_and_clears_it() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    with progress_display(console) as say:
        say("encoding", 5, 1000)
        console.print("in between")
    assert "encoding: 5 of 1,000 …" in out.getvalue()
    assert out.getvalue().endswith("\x1b[2K")


def test_setup_can_be_silent() -> None:
    with progress_display(None) as say:
        say("reading a")


def test_sample_keeps_first_lines_and_whole_characters() -> None:
    assert quote("def f\n\n\n \nx\ufffd\n", "def ").plain == "    │ def f\n    │ \n    │ x"
    assert quote("", "").plain == "    │ "
    assert quote("a\x1b[2J\x07b\tc", "").plain == "    │ a\ufffd[2J\ufffdb\tc"
    long = quote("\n".join("abcdefghijklmnopqrstuvwxyz"), "a").plain.splitlines()
    assert (len(long), long[-1]) == (13, "    │ …")


def test_sample_prompt_is_marked() -> None:
    spans = quote("def f(x)", "def ").spans
    assert [("bold" in str(span.style), span.start, span.end) for span in spans] == [(True, 6, 10)]
    assert quote("other", "def ").spans == []


def test_console_reads_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    make_console().print("[bold]x[/bold] " * 40)
    assert capsys.readouterr().out == "[bold]x[/bold] " * 40 + "\n"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0 s"), (0.04, "0 s"), (0.4, "0.4 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1:00"), (3723, "1:02:03")],
)
def test_durations_are_short(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_validations_and_samples_do_not_count_as_training() -> None:
    now = 0.0
    pace = EtaEstimator(total_steps=10, validation_every=5, clock=lambda: now)
    now = 100.0  # before the start: nothing
    pace.start()
    for _ in range(5):
        now += 2.0
        pace.updated(1000)
    assert pace.tokens_per_s == 500
    assert pace.left_s == 5 * 2  # how long a validation takes is not known yet
    now += 7.0
    pace.validated()
    now += 50.0
    pace.paused()
    assert pace.tokens_per_s == 500
    assert pace.left_s == 5 * 2 + 7
    for _ in range(5):
        now += 2.0
        pace.updated(1000)
    now += 7.0
    pace.validated()
    assert pace.left_s == 0


def test_eta_includes_validation_after_shorter_last_stretch() -> None:
    now = 0.0
    pace = EtaEstimator(total_steps=5, validation_every=4, clock=lambda: now)
    for _ in range(4):
        now += 1.0
        pace.updated(1)
    now += 3.0
    pace.validated()
    assert pace.left_s == 1 + 3
