"""Each block of the page about data files makes its files and trains on them, from an empty folder."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from bigbatch.cli import main
from support.tiers import slow

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "data-files.md"
PRINTED = {
    "alpaca.json": ("3 records in 1 file from alpaca.json", "3 Alpaca records: the prompt is"),
    "answers.csv": ("2 records in 1 file from answers.csv",),
    "lines.jsonl.gz": ("4 records in 1 file from lines.jsonl.gz",),
    "books": ("3 text files from books", "1 file of data without records left out: books/settings.json"),
    "poems": (
        "1 record in 1 file from poems",
        "only 1 file of the split train is used, not README.md, data/test-00000-of-00001.jsonl",
        "validation: the split validation of poems; nothing is held out of the data",
        "validation data: 1 document",
    ),
    "wiki --subset de": ("1 record in 1 file from wiki",),
    "first.jsonl second:2.jsonl": ("1 record in 1 file from first.jsonl", "1 record in 1 file from second:2.jsonl"),
    "first.jsonl --data second:2.jsonl": ("1 record in 1 file from second:2.jsonl", "validation data: 1 document"),
    "news/de songs": (
        "1 record in 1 file from news/de",
        "1 record in 1 file from songs",
        "validation: the split validation of songs; nothing is held out of the data",
        "training data: 2 documents ",
        "validation data: 1 document ",
    ),
    "'logs/**/*.txt'": ("3 text files from logs/**/*.txt",),
    "run.toml": ("1 record in 1 file from sums.jsonl", "1 record in 1 file from more-sums.jsonl"),
    "run.yaml": ("1 record in 1 file from sums.jsonl", "1 record in 1 file from more-sums.jsonl"),
    "mine.jsonl --validation-data held-out.jsonl": ("training data: 1 document", "validation data: 1 document"),
    "mixed --skip-broken": ("1 broken record and 1 broken file left out; the first: mixed/half.jsonl:2:",),
}


def blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def runs() -> list[tuple[str, str]]:
    """Return what each command line trains on, and its block."""
    lines = [(line, block) for block in blocks() for line in block.splitlines() if line.startswith("bigbatch train ")]
    return [(re.sub(r"^bigbatch train --\w+ | --steps 2$", "", line), block) for line, block in lines]


def test_every_command_line_is_expected() -> None:
    assert [name for name, _ in runs()] == list(PRINTED)


FAST = ("alpaca.json", "lines.jsonl.gz", "poems")


@pytest.mark.parametrize(
    ("name", "block"), [run if run[0] in FAST else slow(*run) for run in runs()], ids=[name for name, _ in runs()]
)
def test_block_trains_from_empty_folder(
    name: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    lines = block.splitlines(keepends=True)
    files = "".join(line for line in lines if not line.startswith("bigbatch"))
    subprocess.run(["bash", "-euc", files], check=True)
    (line,) = [line for line in lines if name in line and line.startswith("bigbatch")]
    assert main([*shlex.split(line)[1:], "--device", "cpu", "--microbatch", "2", "--out", "run"]) == 0
    printed = capfd.readouterr().out
    for expected in PRINTED[name]:
        assert expected in printed
