"""The types of the installed package, as mypy and pyright see them from a user's code."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

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


EXPECTED_MISTAKE = re.compile(r"  # type: ignore\[.*\]$", flags=re.MULTILINE)
# No question to a registry whether a newer pyright exists: the program and its Node are those of the wheels.
OFFLINE = {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the consumer, without settings or sources of the checkout."""
    shutil.copy(CONSUMER, tmp_path)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(PYRIGHT), encoding="utf-8")
    return tmp_path


def tool(project: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | OFFLINE
    return subprocess.run(
        words, cwd=project, env=environment, check=False, capture_output=True, text=True, timeout=CHECK_S
    )


def mypy(train: Installation, project: Path) -> subprocess.CompletedProcess[str]:
    flags = ["--config-file=", "--strict", "--cache-dir", train.python.parents[1] / "mypy_cache"]  # torch takes longest
    command = [sys.executable, "-m", "mypy", *flags, "--python-executable", train.python]
    return tool(project, *command, CONSUMER.name)


def pyright(train: Installation, project: Path) -> dict[str, Any]:
    program = Path(sys.executable).with_name("pyright")
    done = tool(project, program, "--outputjson", "--project", project, "--pythonpath", train.python)
    assert not done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 1
    assert done.returncode == bool(report["summary"]["errorCount"]), done.stdout
    return report


def show_mistakes(project: Path) -> list[int]:
    """Remove the comments that mark the consumer's expected mistakes; return the numbers of their lines."""
    consumer = project / CONSUMER.name
    source = consumer.read_text(encoding="utf-8")
    consumer.write_text(EXPECTED_MISTAKE.sub("", source), encoding="utf-8")
    return [number for number, line in enumerate(source.splitlines(), start=1) if EXPECTED_MISTAKE.search(line)]


def test_mypy_accepts_the_consumer(train: Installation, project: Path) -> None:
    done = mypy(train, project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "Success: no issues found in 1 source file\n"


def test_pyright_accepts_the_consumer(train: Installation, project: Path) -> None:
    report = pyright(train, project)
    assert report["generalDiagnostics"] == []


def test_mypy_finds_every_expected_mistake(train: Installation, project: Path) -> None:
    lines = show_mistakes(project)
    assert len(lines) >= 5
    done = mypy(train, project)
    assert [int(line) for line in re.findall(r"^consumer\.py:(\d+): error:", done.stdout, flags=re.MULTILINE)] == lines


def test_pyright_finds_every_expected_mistake(train: Installation, project: Path) -> None:
    lines = show_mistakes(project)
    found = pyright(train, project)["generalDiagnostics"]
    assert sorted({problem["range"]["start"]["line"] + 1 for problem in found}) == lines
    assert {problem["severity"] for problem in found} == {"error"}


def test_package_without_marker_is_rejected(train: Installation, project: Path) -> None:
    """The consumer's expected mistakes are not found in an untyped package."""
    (package,) = train.python.parents[1].glob("lib/python*/site-packages/bigbatch")
    marker = package / "py.typed"
    marker.rename(package / "py.untyped")
    try:
        done = mypy(train, project)
    finally:
        (package / "py.untyped").rename(marker)
    assert done.returncode == 1
    assert "module is installed, but missing library stubs or py.typed marker" in done.stdout
