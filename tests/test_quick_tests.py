"""The selection of `make quick`, and the options of pytest that it and `make slowest` pass."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.scripts import load_script

ROOT = Path(__file__).parents[1]

FILES = {
    "src/bigbatch/__init__.py": '_PUBLIC = {"Engine": "bigbatch.engine.step"}',
    "src/bigbatch/sums/total.py": "",
    "src/bigbatch/engine/step.py": "def step():\n    from bigbatch.sums.total import Total",
    "src/bigbatch/cli/commands/diff.py": "",
    "tests/support/models.py": "from bigbatch.engine import step",
    "tests/sums/test_total.py": "import bigbatch.sums.total",
    "tests/sums/test_total_cuda.py": "",
    "tests/sums/test_other.py": "",
    "tests/engine/test_step.py": "import bigbatch.engine.step",
    "tests/lm/test_run.py": "from support.models import model",
    "tests/cli/commands/test_diff.py": "from bigbatch.cli import main",
    "tests/docs/test_pages.py": 'PAGE = "docs/tutorial.md"',
    "tests/test_public.py": "import bigbatch",
}


@pytest.fixture(scope="module")
def quick() -> Any:
    """The script as a module."""
    return load_script(".ci/quick_tests.py")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        (
            "src/bigbatch/sums/total.py",
            [
                "tests/sums/test_total.py",
                "tests/sums/test_total_cuda.py",
                "tests/sums/test_other.py",
                "tests/engine/test_step.py",
                "tests/lm/test_run.py",
                "tests/test_public.py",
            ],
        ),
        ("src/bigbatch/cli/commands/diff.py", ["tests/cli/commands/test_diff.py"]),
        ("tests/support/models.py", ["tests/lm/test_run.py"]),
        ("tests/lm/test_run.py", ["tests/lm/test_run.py"]),
        ("docs/tutorial.md", ["tests/docs/test_pages.py"]),
        ("LICENSE", []),
    ],
)
def test_affected_tests_are_sorted_by_distance(quick: Any, project: Path, changed: str, tests: list[str]) -> None:
    assert quick.Dependencies(project).tests_of([changed]) == tests


def test_deleted_module_affects_no_test(quick: Any, project: Path) -> None:
    assert quick.Dependencies(project).tests_of(["src/bigbatch/removed.py"]) == []


def test_late_tests_are_skipped_and_cpu_times_listed() -> None:
    words = ["-q", "-p", "no:cacheprovider", "--stop-after=0", "--cpu-times=1", "tests/cli/test_run_lookup.py"]
    done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"CPU seconds in \d+ tests", done.stdout)
    assert re.search(r"\n +\d+\.\d s  tests/cli/test_run_lookup\.py\n", done.stdout)
    assert "not run: the time is over; make test-all runs every test" in done.stdout
    assert "passed" not in done.stdout
