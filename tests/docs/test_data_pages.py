"""The files on the pages about data are read as the pages say, and the command lines parse."""

import re
import shlex
from pathlib import Path

import pytest

from bigbatch.cli import arguments, main

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
EXAMPLE = re.compile(
    r"^## ([^\n]+)\n(?:(?!^## ).)*?^```json\n(.*?)^```\n\n^```\n\$ (.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
EXAMPLES = EXAMPLE.findall((HOW_TO / "data-formats.md").read_text(encoding="utf-8"))


def test_every_shape_has_an_example() -> None:
    assert len(EXAMPLES) == 9
    assert {rows.count("\n") for _, rows, _, _ in EXAMPLES} == {5}


@pytest.mark.parametrize(("rows", "line", "shown"), [e[1:] for e in EXAMPLES], ids=[e[0] for e in EXAMPLES])
def test_example_is_inspected_as_shown(
    rows: str,
    line: str,
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text(rows, encoding="utf-8")
    program, *words = shlex.split(line)
    assert program == "bigbatch"
    assert main([*words, "--samples", "5"]) == 0
    printed = capsys.readouterr().out
    first = printed.partition("sample 1: data.jsonl:1, ")[2].partition("\n")[2]
    assert first.startswith(shown)
    assert "\n5 documents: " in printed


@pytest.mark.parametrize("page", ["chats.md", "data-formats.md", "shards.md"])
def test_command_lines_parse(page: str) -> None:
    lines = re.findall(r"^(?:\$ )?bigbatch (.*)$", (HOW_TO / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert lines
    for line in lines:
        command, *words = shlex.split(line)
        arguments.parse(command, words)
