"""Output that cannot be written, or cannot be encoded, and text that would control the terminal."""

import io
import os
import shlex
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from bigbatch.cli import main
from bigbatch.cli.output import OutputError, guarded_output, optional_output, print_error, visible, wrap


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash with ``$BIGBATCH`` as the command."""
    variables = {"BIGBATCH": f"{shlex.quote(sys.executable)} -m bigbatch", "PYTHONUTF8": "0"} | environment
    return subprocess.run(
        ["bash", "-c", line.replace("$BIGBATCH", variables.pop("BIGBATCH"))],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=os.environ | variables,
        timeout=60,
    )


# streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["--help", "--version", "train --help"])
def test_full_stdout_is_one_sentence_and_1(words: str, tmp_path: Path) -> None:
    done = shell(f"$BIGBATCH {words} > /dev/full", tmp_path)
    prefix = "bigbatch train" if words.startswith("train") else "bigbatch"
    assert done.returncode == 1
    assert done.stderr.decode() == f"{prefix}: stdout cannot be written: no space left on device.\n"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("$BIGBATCH --help >&-", 0),
        ("$BIGBATCH plan --help >&- 2>&- <&-", 0),
        ("$BIGBATCH train --steps 0 >&- 2>&-", 2),
        ("$BIGBATCH resume nowhere 2> /dev/full", 2),
        ("$BIGBATCH advise nowhere 2>&-", 2),
        ("$BIGBATCH train --steps 0 > /dev/full", 2),
    ],
)
def test_closed_or_full_streams_keep_exit_code(line: str, code: int, tmp_path: Path) -> None:
    assert shell(line, tmp_path).returncode == code


def test_closed_descriptor_is_not_reused(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from bigbatch.cli.output import guarded_output\n"
        "with guarded_output():\n"
        "    with open('file', 'w') as file:\n"
        "        print('to stdout', flush=True)\n"
        "        sys.exit(0 if file.fileno() > 2 else 9)\n"
    )
    (tmp_path / "script.py").write_text(script)
    assert shell(f"{shlex.quote(sys.executable)} script.py <&- >&- 2>&-", tmp_path).returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


class FailingStream(io.StringIO):
    """A stream on a device that becomes full after ``room`` writes."""

    def __init__(self, room: int, error: OSError) -> None:
        super().__init__()
        self.room = room
        self.error = error

    def write(self, text: str) -> int:
        if self.room == 0:
            raise self.error
        self.room -= 1
        return super().write(text)


def test_optional_output_continues_and_reports_once() -> None:
    out, err = FailingStream(2, OSError(28, "No space left on device")), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), guarded_output(), optional_output("bigbatch train"):
        for step in range(5):
            print(f"update {step}")
    assert out.getvalue() == "update 0\n"
    assert err.getvalue() == (
        "bigbatch train: stdout cannot be written (no space left on device): the run continues without output. Its "
        "updates are in metrics.jsonl in the run directory.\n"
    )


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(5, "Input/output error"), "stdout cannot be written: input/output error."),
        (BrokenPipeError(32, "Broken pipe"), ""),
    ],
)
def test_required_output_raises_once(error: OSError, sentence: str) -> None:
    with redirect_stdout(FailingStream(2, error)), guarded_output():
        print("first", end="")
        with pytest.raises(OutputError) as caught:
            print("second", end="")
        print("discarded")
    assert str(caught.value) == sentence


def test_streams_are_restored() -> None:
    before = sys.stdout, sys.stderr, getattr(sys.stdout, "errors", None)
    assert main(["--version"]) == 0
    assert (sys.stdout, sys.stderr, getattr(sys.stdout, "errors", None)) == before


# encodings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_help_is_printed_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    done = shell("$BIGBATCH train --help", tmp_path, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    text = " ".join(done.stdout.decode(encoding).split())
    assert ("sqrt = lr × √k" in text) == (encoding == "utf-8")
    assert ("sqrt = lr x sqrt k" in text) == (encoding == "ascii")


def test_c_locale_prints_names_of_any_bytes(tmp_path: Path) -> None:
    name = b"./na\xefve-\xf0\x9f\x98\x80.txt".decode("utf-8", "surrogateescape")
    done = shell(f"$BIGBATCH resume {name}", tmp_path, LC_ALL="C")
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert done.stderr.startswith(b"bigbatch resume: ")


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", b"update 1/2 - 3 x 4 ... | -> # \\u4f60 \\xfc"),
        ("cp1252", b"update 1/2 \xb7 3 \xd7 4 \x85 | -> # \\u4f60 \xfc"),
        ("utf-8", "update 1/2 · 3 × 4 … │ → █ 你 ü".encode()),
    ],
)
def test_missing_characters_are_replaced_by_similar_ones(encoding: str, expected: bytes) -> None:
    raw = io.BytesIO()
    with redirect_stdout(io.TextIOWrapper(raw, encoding=encoding)), guarded_output():
        print("update 1/2 · 3 × 4 … │ → █ 你 ü", end="", flush=True)
        assert raw.getvalue() == expected


# text ------------------------------------------------------------------------------------------------------------


def test_visible_keeps_named_characters() -> None:
    assert visible("a\tb\nc\r\x1b[0m", keep="\n\t") == "a\tb\nc\\r\\x1b[0m"
    assert visible("\x7f\x85\u202a\u202c\u2069") == "\\x7f\\x85\\u202a\\u202c\\u2069"


@pytest.mark.parametrize("word", ["\x1b[2J", "a\rb", "\u202eabc", "\x9b1A", "two\nlines"])
def test_errors_show_control_characters(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", word]) == 2
    assert main(["train", "--data", f"./{word}.txt"]) == 2
    assert main(["train", f"--{word}"]) == 2
    assert main([word]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 4
    assert visible(printed, keep="\n") == printed
    assert visible(word) in printed


def test_warning_shows_control_characters() -> None:
    before = warnings.formatwarning
    with guarded_output():
        shown = warnings.formatwarning("model \x1b[31mtype", UserWarning, "a\rb.py", 1)
    assert shown.startswith("a\\rb.py:1: UserWarning: model \\x1b[31mtype\n")
    assert warnings.formatwarning is before


def test_error_breaks_at_spaces_on_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "40")
    err = Terminal()
    with redirect_stderr(err):
        print_error("bigbatch train", "--max-length 65 is more than the 64 positions of base: pass less.")
    assert err.getvalue() == (
        "bigbatch train: --max-length 65 is more\n  than the 64 positions of base: pass\n  less.\n"
    )


def test_wrapped_line_keeps_indentation() -> None:
    assert wrap("  a line of several words", 20) == "  a line of several\n    words"
    assert wrap("short", 12) == "short"
