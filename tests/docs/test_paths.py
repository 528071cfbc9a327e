"""Every file, module and link that the documentation names exists."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        *(
            ROOT / name
            for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md")
        ),
        *(ROOT / "docs").rglob("*.md"),
    )
)
BENCHMARKS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").glob("*.py"))
REPOSITORY_PATH = re.compile(r"(?<![\w./-])((?:src|tests|docs|benchmarks|examples)/[\w./-]*\w)")
CODE_SPAN = re.compile(r"`+([^`\n]+)`+")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PYTHON_FILES = {
    path.name for folder in ("src", "tests", "docs", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")
}


def missing_paths(text: str) -> list[str]:
    """Return the paths of repository files, and the bare names of Python files, that do not exist."""
    paths = [path for path in REPOSITORY_PATH.findall(text) if not (ROOT / path).exists()]
    names = [span for span in CODE_SPAN.findall(text) if re.fullmatch(r"\w+\.py", span) and span not in PYTHON_FILES]
    return paths + names


def resolves(dotted: str) -> bool:
    """Return whether a dotted name is a module, or an attribute of one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


def missing_names(text: str) -> list[str]:
    """Return the dotted names of the package in code spans that cannot be imported."""
    names = {name for span in CODE_SPAN.findall(text) for name in re.findall(r"(?<![\w./])bigbatch(?:\.\w+)+", span)}
    return sorted(name for name in names if not resolves(name))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, formed as GitHub does."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    assert not missing_paths((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_names_in_a_page_resolve(page: str) -> None:
    assert not missing_names((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    path = ROOT / page
    broken = []
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        if target.startswith(("http:", "https:")):
            continue
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("script", BENCHMARKS)
def test_files_that_a_benchmark_names_exist(script: str) -> None:
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    text = "\n".join(ast.get_docstring(node) or "" for node in nodes)
    assert not missing_paths(text)
    assert not missing_names(text)


def test_missing_files_and_names_are_reported() -> None:
    assert missing_paths("`tests/no_such_test.py`, `no_such_file.py`") == ["tests/no_such_test.py", "no_such_file.py"]
    assert missing_names("`bigbatch.Engine`, `bigbatch.no_such.name`") == ["bigbatch.no_such.name"]
