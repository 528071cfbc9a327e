"""The types of the installed package, as mypy and pyright see them from a user's code."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, Installation

CONSUMER = ROOT / "tests" / "typing" / "consumer.py"
CHECK_S = 900
# The consumer passes untyped things of torch around, whose unknown parts are torch's.
PYRIGHT = {
    "typeCheckingMode": "strict",
    "enableTypeIgnoreComments": True,
    "reportUnnecessaryTypeIgnoreComment": "error",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the consumer, without settings or sources of the checkout."""
    shutil.copy(CONSUMER, tmp_path)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(PYRIGHT), encoding="utf-8")
    return tmp_path


def tool(project: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=project, check=False, capture_output=True, text=True, timeout=CHECK_S)


def test_mypy_accepts_the_consumer(train: Installation, project: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--config-file=", "--strict", "--python-executable", train.python]
    done = tool(project, *command, CONSUMER.name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "Success: no issues found in 1 source file\n"


def test_pyright_accepts_the_consumer(train: Installation, project: Path) -> None:
    program = Path(sys.executable).with_name("basedpyright")
    done = tool(project, program, "--project", project, "--pythonpath", train.python, CONSUMER.name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 errors, 0 warnings" in done.stdout


def test_package_without_marker_is_rejected(train: Installation, project: Path) -> None:
    """The consumer's expected mistakes are not found in an untyped package."""
    (package,) = train.python.parents[1].glob("lib/python*/site-packages/bigbatch")
    marker = package / "py.typed"
    marker.rename(package / "py.untyped")
    try:
        command = [sys.executable, "-m", "mypy", "--config-file=", "--strict", "--python-executable", train.python]
        done = tool(project, *command, CONSUMER.name)
    finally:
        (package / "py.untyped").rename(marker)
    assert done.returncode == 1
    assert "module is installed, but missing library stubs or py.typed marker" in done.stdout
