"""What a run shows, on a terminal and off it."""

import io
import json
import re
from typing import Any

import pytest
from rich.progress import Progress

from bigbatch.cli.console import (
    LiveLine,
    OutputConsole,
    TrainingDisplay,
    duration,
    make_console,
    progress_display,
    quote,
)
from bigbatch.cli.eta import EtaEstimator
from bigbatch.cli.output import visible


def row(step: int, **changes: Any) -> dict[str, Any]:
    return {"step": step, "loss": 2.5, "tokens": 1, "peak_bytes": 2**30, "skipped": None} | changes


def shown(*, terminal: bool, width: int = 100, total_steps: int = 100, skipped: int = 0) -> str:
    """What a run of that many updates prints, with a validation at half of them and a sample at the end."""
    out = io.StringIO()
    console = OutputConsole(file=out, force_terminal=terminal, width=width)
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
    assert "\nupdate 50: validation loss 3.250, perplexity 25.79 (unigram baseline: loss 6.500)\n" in printed
    assert printed.endswith("update 100: sample from the model\n    │ def [red]f():\n    │     pass\n")
    assert "\x1b" not in printed


def live_lines(printed: str) -> list[str]:
    """Return the states of the live line, without escape sequences and bar."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed)
    lines = [line.lstrip("━╺╸ ") for line in re.split(r"[\r\n]", plain)]
    return [line.rstrip() for line in lines if re.match(r"(update )?[\d,]+/[\d,]+( · |\s*$)", line)]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 300])
def test_live_line_fits_terminal(width: int) -> None:
    printed = shown(terminal=True, width=width)
    live = live_lines(printed)
    assert live
    assert max(map(len, live)) <= width
    assert ("━" in printed) == (width >= 80)
    assert all("/100" in line for line in live)
    if width >= 40:
        assert "loss 2.500 · " in live[-1]
        assert " left" in live[-1]
    if width >= 60:
        assert " tokens/s · " in live[-1]
    if width >= 80:
        assert live[-1].endswith("GiB")


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (40, "update 7/300 · loss 2.500 · 5:00 left"),
        (30, "update 7/300 · loss 2.500"),
        (12, "update 7/300"),
        (8, "7/300"),
        (64, "update 7/300 · loss 2.500 · 12,345 tokens/s · 5:00 left"),
        (79, "update 7/300 · loss 2.500 · 12,345 tokens/s · 5:00 left · 1.00 GiB"),
    ],
)
def test_live_line_drops_least_important_parts(width: int, expected: str) -> None:
    console = OutputConsole(file=io.StringIO(), force_terminal=True, width=width)
    progress = Progress(console=console)
    parts = ("loss 2.500", "12,345 tokens/s", "5:00 left", "1.00 GiB", "noise scale not measurable yet")
    task = progress.add_task("", total=300, completed=7, parts=parts)
    assert LiveLine(console, reserved=0).render(progress.tasks[task]).plain == expected


def test_skipped_update_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert "update 7 was skipped and changed nothing: no items\n" in shown(terminal=False, skipped=7)
    assert "update 7 was skipped and changed nothing: no items" in shown(terminal=True, skipped=7)


def test_run_of_one_update_shows_it_once() -> None:
    assert shown(terminal=False, total_steps=1).count("update 1/1 · ") == 1


def test_time_to_the_first_update_is_shown_once() -> None:
    out = io.StringIO()
    console = OutputConsole(file=out, force_terminal=False, width=100)
    settings: dict[str, Any] = {"total_steps": 9, "validation_every": None, "entropy": None, "prompt": ""}
    with TrainingDisplay(console, **settings, done=4, since_start_s=lambda: 83.4) as display:
        display.on_update(row(5))
        display.on_update(row(6))
    assert out.getvalue().count("first update 1:23 after the start of the command\n") == 1
    assert "after the start" not in shown(terminal=False)


def test_unknown_memory_is_reported() -> None:
    out = io.StringIO()
    console = OutputConsole(file=out, force_terminal=False, width=100)
    with TrainingDisplay(console, total_steps=1, validation_every=None, entropy=None, prompt="") as display:
        display.on_update(row(1, peak_bytes=None))
        display.on_validation(1, 3.0)
    assert "memory unknown" in out.getvalue()
    assert "validation loss 3.000, perplexity 20.09\n" in out.getvalue()


def test_setup_without_terminal_prints_each_stage_once() -> None:
    out = io.StringIO()
    with progress_display(OutputConsole(file=out, force_terminal=False)) as say:
        say("reading a")
        say("encoding")
        say("encoding", 5, 10)
    assert out.getvalue() == "reading a …\nencoding …\n"


def test_setup_on_terminal_shows_progress_and_clears_it() -> None:
    out = io.StringIO()
    console = OutputConsole(file=out, force_terminal=True, width=80)
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
    assert quote("a\x1b[2J\x07b\tc", "").plain == "    │ a\\x1b[2J\\x07b\tc"
    long = quote("\n".join("abcdefghijklmnopqrstuvwxyz"), "a").plain.splitlines()
    assert (len(long), long[-1]) == (13, "    │ …")


def test_sample_breaks_at_spaces_behind_its_bar() -> None:
    text = "def f(x): return x\n    if a and b and c:\n" + "y" * 30
    assert quote(text, "def ", width=22).plain.splitlines() == [
        "    │ def f(x): return",
        "    │ x",
        "    │     if a and b",
        "    │ and c:",
        f"    │ {'y' * 16}",
        f"    │ {'y' * 14}",
    ]


def test_sample_prompt_is_marked() -> None:
    spans = quote("def f(x)", "def ").spans
    assert [("bold" in str(span.style), span.start, span.end) for span in spans] == [(True, 6, 10)]
    assert quote("other", "def ").spans == []


def test_console_reads_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    make_console().print("[bold]x[/bold] " * 40)
    assert capsys.readouterr().out == "[bold]x[/bold] " * 40 + "\n"


HOSTILE = {
    "a\x1b[31mred": "a\\x1b[31mred",
    "\x1b]0;title\x07": "\\x1b]0;title\\x07",
    "\x9b2Jc1": "\\x9b2Jc1",
    "abc\rxyz": "abc\\rxyz",
    "abc\b\b\b": "abc\\x08\\x08\\x08",
    "txt.\u202egnp": "txt.\\u202egnp",
    "a\u2066b\u2069": "a\\u2066b\\u2069",
    "one\ntwo": "one\\ntwo",
    "line\u2028end": "line\\u2028end",
    "\udcff.txt": "\\udcff.txt",
    "[bold]x[/bold] :smile:": "[bold]x[/bold] :smile:",
    "שלום é 日本": "שלום é 日本",
}


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("terminal", [False, True])
def test_control_characters_are_printed_as_escapes(text: str, terminal: bool) -> None:
    out = io.StringIO()
    console = OutputConsole(file=out, force_terminal=terminal, width=100)
    console.print(text)
    console.print_unbroken(text)
    assert out.getvalue() == f"{HOSTILE[text]}\n" * 2


@pytest.mark.parametrize("text", ["a\x1b[31mred", "[red]x[/red]", "b\u202ec"])
def test_live_progress_escapes_names(text: str) -> None:
    out = io.StringIO()
    with progress_display(OutputConsole(file=out, force_terminal=True, width=80)) as progress:
        progress(f"reading {text}", 5, 1000)
    assert f"reading {visible(text)}: 5 of 1,000 …" in out.getvalue()


def test_live_progress_keeps_count_on_narrow_terminal() -> None:
    out = io.StringIO()
    with progress_display(OutputConsole(file=out, force_terminal=True, width=40)) as progress:
        progress("encoding the documents of a very long folder name", 5, 300)
    assert "encoding the documents o…: 5 of 300 …" in out.getvalue()


@pytest.mark.parametrize("width", [40, 80])
def test_lines_break_at_spaces_on_terminal(width: int) -> None:
    sentence = "split into 4 micro-batches of up to 8 sequences, on cpu, float32 (affects memory only, not the result)"
    path = "/a/very/long/path/that/is/wider/than/a/narrow/terminal/of/forty/columns/and/than/eighty/data.jsonl"
    out = io.StringIO()
    console = OutputConsole(file=out, force_terminal=True, width=width)
    console.print(sentence)
    console.print(f"  reading {path}")
    console.print_unbroken(sentence)
    lines = out.getvalue().splitlines()
    assert lines[-1] == sentence
    assert lines[-2] == f"    {path}"
    assert lines[-3] == "  reading"
    assert " ".join(" ".join(lines[:-3]).split()) == sentence
    assert max(map(len, lines[:-3])) <= width


def test_json_stays_whole_on_terminal() -> None:
    out = io.StringIO()
    text = json.dumps({"reason": "word " * 40})
    OutputConsole(file=out, force_terminal=True, width=40).print(text)
    assert out.getvalue() == f"{text}\n"


def test_lines_stay_whole_without_terminal() -> None:
    out = io.StringIO()
    OutputConsole(file=out, force_terminal=False, width=40).print("word " * 40)
    assert out.getvalue() == "word " * 40 + "\n"


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
