"""The Python and the command lines in README, docs and docstrings run, and do what the text around them says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.command_line import command
from support.doc_pages import blocks, pages_that_run_alone

ROOT = Path(__file__).parents[2]
real_run = subprocess.run
LIGHTNING = pytest.mark.filterwarnings(  # raised by every Trainer
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
    "ignore:The 'train_dataloader' does not have many workers:UserWarning",
)
PAGES = [
    pytest.param(page, marks=LIGHTNING if page.endswith("/lightning.md") else ()) for page in pages_that_run_alone()
]


@pytest.mark.parametrize("page", PAGES)
def test_python_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", run_fork)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block.text, f"{page}, block {number + 1}", "exec"), names)


def run_fork(words: list[str], *, check: bool = False, **settings: Any) -> subprocess.CompletedProcess[Any]:
    """Run a command of a page in a fork of the loaded process instead of a new interpreter; other commands as asked."""
    if words[:3] != [sys.executable, "-m", "bigbatch"]:
        return real_run(words, check=check, **settings)  # of a library, such as what Lightning asks the machine
    assert not settings
    done = command(*words[3:], folder=Path.cwd())
    if check and done.returncode:
        raise subprocess.CalledProcessError(done.returncode, words, done.stdout, done.stderr)
    return done


def test_readme_example_prints_the_proof(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in blocks("README.md", "python"):
        exec(compile(block.text, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "exact: every cut gives the full-batch gradient" in printed


@pytest.mark.parametrize("name", ["Accumulator", "Engine", "Window"])
def test_loop_in_a_docstring_updates_the_model(name: str) -> None:
    import textwrap

    import torch
    import torch.nn.functional as F

    import bigbatch

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    data = [(torch.randn(2, 3), torch.randn(2, 1)) for _ in range(5)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {
        "F": F,
        "Accumulator": bigbatch.Accumulator,
        "Engine": bigbatch.Engine,
        "model": model,
        "optimizer": optimizer,
        "loader": data,
        "loss_fn": lambda model, part: (F.mse_loss(model(part[0]), part[1], reduction="sum"), part[1].numel()),
        "window": bigbatch.Accumulator(model, optimizer).window(data),
    }
    before = model.weight.detach().clone()
    docstring = getattr(bigbatch, name).__doc__
    code = re.search(r"\n\n((?:        .*\n|\n)+)", docstring)
    assert code is not None
    exec(textwrap.dedent(code.group(1)), names)
    assert names["report"].step >= 1
    assert not torch.equal(model.weight, before)


def launches() -> list[str]:
    page = (ROOT / "docs/how-to/several-machines.md").read_text(encoding="utf-8")
    found = re.findall(r"^(torchrun .*|bigbatch .*)$", page, flags=re.MULTILINE)
    assert len(found) >= 8
    return found


@pytest.mark.parametrize("line", launches())
def test_launch_lines_parse(line: str) -> None:
    from torch.distributed.run import get_args_parser

    from bigbatch.cli import arguments

    words = shlex.split(line)[1:]
    if line.startswith("torchrun"):
        parsed = get_args_parser().parse_args(words)
        assert (parsed.module, parsed.training_script) == (True, "bigbatch")
        words = parsed.training_script_args
    arguments.parse(words[0], words[1:])


def test_faults_page_names_existing_tests() -> None:
    page = (ROOT / "docs/explanation/faults.md").read_text(encoding="utf-8")
    there = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    missing = [name for name in re.findall(r"`(test_\w+)`", page) if f"def {name}(" not in there]
    assert not missing
