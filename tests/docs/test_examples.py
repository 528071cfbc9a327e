"""The Python and the command lines in README, docs and docstrings run, and do what the text around them says."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIGHTNING = pytest.mark.filterwarnings(  # raised by every Trainer
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
    "ignore:The 'train_dataloader' does not have many workers:UserWarning",
)
PAGES = [
    "README.md",
    "docs/tutorial.md",
    "docs/how-to/own-loop.md",
    "docs/how-to/fit-memory.md",
    "docs/how-to/offload.md",
    "docs/how-to/accelerate.md",
    "docs/how-to/batch-norm.md",
    "docs/how-to/contrastive.md",
    "docs/how-to/large-data.md",
    "docs/how-to/shards.md",
    "docs/how-to/reproducible.md",
    pytest.param("docs/how-to/lightning.md", marks=LIGHTNING),
    "docs/explanation/exactness.md",
    "docs/explanation/scaling-rules.md",
]


def blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_python_of_a_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks(page)
    assert code, f"{page} has no Python block"
    names: dict[str, object] = {}
    for number, block in enumerate(code):
        exec(compile(block, f"{page}, block {number + 1}", "exec"), names)


def test_readme_example_prints_the_proof(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in blocks("README.md"):
        exec(compile(block, "README.md", "exec"), names)
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
