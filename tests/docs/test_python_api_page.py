"""The Python of the page about `bigbatch.lm.train` runs, and its example is short."""

import re
from pathlib import Path

import pytest

from bigbatch.lm.training.user_callbacks import METHODS
from support.language_models import save_model_folder

PAGE = Path(__file__).parents[2] / "docs/how-to/python-api.md"


def test_python_of_api_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model_folder(tmp_path / "base")
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE}, block {number + 1}", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("runs/sums/model ")
    assert re.search(r"^stopped after update \d+$", printed, re.MULTILINE)
    assert not names["stopped"].finished  # type: ignore[attr-defined]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"sums", "rated"}


def test_example_with_dataset_loss_and_callback_is_short() -> None:
    _, example, *_ = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 30


def test_every_method_of_callbacks_is_on_the_page() -> None:
    table = re.findall(r"^\| `(on_\w+)\(", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert tuple(table) == METHODS
