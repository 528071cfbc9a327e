"""The page about the command line: what a reader types from its first own file to a resumed run works in that order."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from bigbatch.cli import main
from support.doc_pages import blocks, is_command, text_of

PAGE = "docs/how-to/train.md"
QUICK = ("--device", "cpu", "--microbatch", "4", "--global-batch", "16", "--max-length", "64")


def test_commands_of_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "1000")
    _, *rest = blocks(PAGE, "bash")  # the first installs, and trains for minutes
    printed = {}
    for block in rest:
        files = "\n".join(line for line in block.text.splitlines() if not is_command(line))
        subprocess.run(["bash", "-euc", files], check=True)
        for line in filter(is_command, block.text.splitlines()):
            words = shlex.split(line)[1:]
            if words[0] == "plan":  # takes longest, and runs on the pages about pretraining and QLoRA
                continue
            assert main([*words, *(QUICK[: {"train": 8, "verify": 2}.get(words[0], 0)])]) == 0, line
            printed[words[0]] = capfd.readouterr().out
    assert list(printed) == ["inspect", "train", "report", "generate", "resume", "verify"]
    assert re.search(r"^  trained │ \d+<", printed["inspect"], re.MULTILINE)
    assert "next: bigbatch generate runs/chat --chat" in printed["train"]
    assert "bigbatch verify --data chats.jsonl" in printed["train"]
    assert "already finished" in printed["resume"]
    assert "exact: every cut gives the full-batch gradient" in printed["verify"]
    assert (tmp_path / "runs/chat/report.html").stat().st_size > 10_000


def test_flags_in_the_table_are_flags_of_train() -> None:
    from bigbatch.cli.command_specs import COMMAND_SPECS

    flags = re.findall(r"`--([\w-]+)", text_of(PAGE).partition("## Look at the run")[0])
    assert len(flags) >= 6
    assert {flag.replace("-", "_") for flag in flags} <= COMMAND_SPECS["train"].fields().keys()
