"""`make release-check` refuses what is not ready, one sentence for each reason."""

import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from types import ModuleType

import pytest

from support.scripts import load_script

ROOT = Path(__file__).parents[1]
TODAY = date(2026, 12, 1)
READY = (
    "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2026-12-01\n\n### Added\n\n- A thing.\n\n## [1.1.0] - 2026-11-01\n"
)
CITATION = 'cff-version: 1.2.0\nversion: 1.2.0\ndate-released: "2026-12-01"\n'


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return load_script(".ci/release_check.py")


def git(root: Path, *words: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@localhost", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, *words], cwd=root, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    package = tmp_path / "src" / "bigbatch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "1.2.0"\n', encoding="utf-8")
    (tmp_path / "CHANGELOG.md").write_text(READY, encoding="utf-8")
    (tmp_path / "CITATION.cff").write_text(CITATION, encoding="utf-8")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    return tmp_path


def test_ready_repository_has_no_problem(check: ModuleType, repository: Path) -> None:
    assert check.problems_of(repository, TODAY) == []
    git(repository, "tag", "v1.2.0")
    assert check.problems_of(repository, TODAY) == []


@pytest.mark.parametrize(
    ("before", "after", "problems"),
    [
        ("[1.2.0]", "[1.3.0]", ["CHANGELOG.md has no section for 1.2.0: write ## [1.2.0] - 2026-12-01."]),
        (
            " - 2026-12-01",
            "",
            ["## [1.2.0] in CHANGELOG.md has no date: write ## [1.2.0] - 2026-12-01."],
        ),
        (
            "2026-12-01",
            "2026-12-02",
            ["## [1.2.0] - 2026-12-02 in CHANGELOG.md is dated later than today, 2026-12-01."],
        ),
        ("- A thing.", "", ["## [1.2.0] - 2026-12-01 in CHANGELOG.md has no entry."]),
        (
            "## [Unreleased]\n",
            "## [Unreleased]\n\n- Another.\n",
            ["CHANGELOG.md has entries under [Unreleased]: move them to a section of 1.2.0."],
        ),
    ],
)
def test_problem_of_changelog_is_named(check: ModuleType, before: str, after: str, problems: list[str]) -> None:
    assert before in READY
    assert check.changelog_problems(READY.replace(before, after, 1), "1.2.0", TODAY) == problems


@pytest.mark.parametrize(
    ("before", "after", "problems"),
    [
        ("\nversion: 1.2.0", "", ["CITATION.cff has the version None: write version: 1.2.0."]),
        ("\nversion: 1.2.0", "\nversion: 1.1.0", ["CITATION.cff has the version 1.1.0: write version: 1.2.0."]),
        ("12-01", "12-02", ['CITATION.cff has the date 2026-12-02: write date-released: "2026-12-01".']),
    ],
)
def test_problem_of_citation_is_named(check: ModuleType, before: str, after: str, problems: list[str]) -> None:
    assert check.citation_problems(CITATION, READY, "1.2.0") == []
    assert check.citation_problems(CITATION.replace(before, after, 1), READY, "1.2.0") == problems


def test_dirty_tree_and_version_that_is_not_final_are_refused(check: ModuleType, repository: Path) -> None:
    (repository / "src" / "bigbatch" / "__init__.py").write_text('__version__ = "1.2.0rc1"\n', encoding="utf-8")
    assert check.problems_of(repository, TODAY) == [
        "the version 1.2.0rc1 in src/bigbatch/__init__.py is not final: write X.Y.Z.",
        "CHANGELOG.md has no section for 1.2.0rc1: write ## [1.2.0rc1] - 2026-12-01.",
        "CITATION.cff has the version 1.2.0: write version: 1.2.0rc1.",
        "the working tree has 1 uncommitted changes: commit or remove them.",
    ]


def test_tag_of_another_commit_is_refused(check: ModuleType, repository: Path) -> None:
    git(repository, "tag", "v1.2.0")
    git(repository, "commit", "--quiet", "--allow-empty", "-m", "two")
    assert check.problems_of(repository, TODAY) == [
        "v1.2.0 is the tag of another commit: raise __version__ in src/bigbatch/__init__.py."
    ]


def test_tag_of_another_version_is_refused(check: ModuleType, repository: Path) -> None:
    git(repository, "tag", "v1.3.0")
    git(repository, "tag", "verified")
    assert check.problems_of(repository, TODAY) == [
        "the last commit has the tag v1.3.0, and its version is 1.2.0: tag it v1.2.0."
    ]


def test_command_ends_with_one_and_says_why(repository: Path) -> None:
    (repository / ".ci").mkdir()
    (repository / ".ci" / "release_check.py").write_bytes((ROOT / ".ci" / "release_check.py").read_bytes())
    done = subprocess.run(
        [sys.executable, repository / ".ci" / "release_check.py"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "the working tree has 1 uncommitted changes: commit or remove them." in done.stderr.splitlines()
