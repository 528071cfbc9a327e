"""Every notebook runs in a kernel of its own and shows what is saved in it; its claims are assertions of its cells."""

import base64
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from support.forked_kernels import forked_kernels
from support.scripts import load_script
from support.tiers import slow

from .test_wording import hits

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs/make_notebooks.py"
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("docs/make_notebooks.py")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False)


def notebook_of(*cells: NotebookNode) -> NotebookNode:
    return new_notebook(cells=list(cells), metadata={"kernelspec": KERNELSPEC})


def printed(text: str, name: str = "stdout") -> NotebookNode:
    return new_code_cell("print()", outputs=[new_output("stream", name=name, text=text)])


def test_three_notebooks_are_found() -> None:
    assert {path.stem for path in NOTEBOOKS} >= {"accumulation", "trainer", "contrastive"}


@pytest.mark.parametrize(
    "path",
    [path if path.stem == "accumulation" else slow(path) for path in NOTEBOOKS],
    ids=lambda path: path.name,
)
def test_notebook_runs_and_shows_what_is_saved(path: Path, script: ModuleType) -> None:
    if path.stem == "accumulation":  # its kernel is a new interpreter, started by the script
        done = run("--check", str(path))
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout == f"{path.name}: ok\n"
    else:
        with forked_kernels():
            assert script.make(path, check=True) == []


@every_notebook
def test_saved_notebook_has_outputs_pictures_and_claims(path: Path, script: ModuleType) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = script.code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert script.problems(notebook) == []
    assert sum("picture" in script.shown(cell) for cell in cells) >= 2
    assert sum("assert " in cell.source for cell in cells) >= 3
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(?:home|root|tmp|work|usr)/", text), "a path of one machine"


@every_notebook
def test_text_names_files_that_exist_in_plain_words(path: Path, tmp_path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    prose = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    page = tmp_path / f"{path.stem}.md"
    page.write_text(prose, encoding="utf-8")
    assert hits(page) == []
    named = re.findall(r"(?:docs/[\w./-]+\.md|[\w-]+\.ipynb)", prose)
    assert len(named) >= 2
    folders = {".md": ROOT, ".ipynb": ROOT / "docs/notebooks"}
    assert [name for name in named if not (folders[Path(name).suffix] / name).is_file()] == []


def test_failing_cell_and_text_on_stderr_fail_the_check(tmp_path: Path) -> None:
    raising, warning = tmp_path / "raising.ipynb", tmp_path / "warning.ipynb"
    nbformat.write(
        notebook_of(new_markdown_cell("# One"), new_code_cell("assert 1 + 1 == 3, 'a false claim'")), raising
    )
    nbformat.write(notebook_of(new_code_cell("import warnings\nwarnings.warn('careful')")), warning)
    before = warning.read_bytes()
    done = run("--check", str(raising), str(warning))
    assert done.returncode == 1
    assert "raising.ipynb: failed" in done.stdout
    assert "AssertionError: a false claim" in done.stdout
    assert "warning.ipynb: failed\ncode cell 1 printed to stderr: " in done.stdout
    assert "UserWarning: careful" in done.stdout
    assert warning.read_bytes() == before


def test_outputs_are_saved_without_check(tmp_path: Path) -> None:
    path = tmp_path / "new.ipynb"
    nbformat.write(notebook_of(new_code_cell("print('seven', 3 + 4)")), path)
    assert run(str(path)).returncode == 0
    (cell,) = nbformat.read(path, as_version=4).cells
    assert [output.text for output in cell.outputs] == ["seven 7\n"]


def test_numbers_bars_and_rows_may_differ(script: ModuleType) -> None:
    saved = notebook_of(printed("loss 1.25e-07 (3 %)\n 0  ███░ 4  90.5%\n 1  █░░ 2  40%\nend"))
    again = notebook_of(printed("loss 3e-08 (12 %)\n 0  ██░░ 4  80.0%\nend"))
    assert script.differences(saved, again) == []


def test_other_text_is_a_difference(script: ModuleType) -> None:
    saved, again = notebook_of(printed("loss 1\nexact")), notebook_of(printed("loss 1\nNOT exact"))
    assert script.differences(saved, again) == [
        "code cell 1 shows ['loss', 'NOTexact'], and ['loss', 'exact'] is saved"
    ]
    again.cells[0].metadata["tags"] = ["varies"]
    assert script.differences(saved, again) == []


def test_large_picture_is_a_problem(script: ModuleType) -> None:
    picture = new_output("display_data", data={"image/png": base64.b64encode(bytes(60_001)).decode()})
    found = script.problems(notebook_of(new_code_cell("draw()", outputs=[picture])))
    assert found == ["code cell 1 has a picture of 60001 bytes; at most 60000"]
