"""The Python in the README, the documents and the docstrings runs, and does what the text around it says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "docs/tutorial.md",
    "docs/how-to/own-loop.md",
    "docs/how-to/fit-memory.md",
    "docs/explanation/exactness.md",
    "docs/explanation/scaling-rules.md",
]


def blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks(page)
    assert code, f"{page} has no Python block"
    names: dict[str, object] = {}
    for number, block in enumerate(code):
        exec(compile(block, f"{page}, block {number + 1}", "exec"), names)


def test_the_readme_proves_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in blocks("README.md"):
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "exact: every cut gives the full-batch gradient" in printed


@pytest.mark.parametrize("name", ["Accumulator", "Engine", "Window"])
def test_the_loop_in_a_docstring_runs(name: str) -> None:
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
