"""Files for a public forge: the workflows call make targets that exist, on the Pythons that the package supports."""

import importlib.metadata as metadata
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import bigbatch

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
EXPECTED = {"lint", "test-all", "test-versions", "docs", "dist", "sbom", "test-release", "release-check"}


def load(path: Path) -> dict[Any, Any]:
    """Parse a workflow. YAML 1.1 reads the key ``on`` as true."""
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def jobs() -> list[dict[str, Any]]:
    return [job for path in WORKFLOWS for job in load(path)["jobs"].values()]


def commands() -> list[str]:
    return [step["run"] for job in jobs() for step in job["steps"] if "run" in step]


def make_targets() -> set[str]:
    return {command.split()[1] for command in commands()}


def test_every_command_is_one_make_target() -> None:
    assert [command for command in commands() if not re.fullmatch(r"make [a-z-]+( ARGS=\"[^\"\n]*\")?", command)] == []
    assert make_targets() == EXPECTED


def test_uploaded_folder_has_the_bill_of_materials() -> None:
    """Each of these targets creates dist/ again, and only sbom writes the bill: it is the last."""
    for job in jobs():
        steps = [step.get("run", step.get("uses")) for step in job["steps"]]
        if any(step.startswith("actions/upload-artifact") for step in steps):
            assert [step for step in steps if step.startswith("make ")][-1] == "make sbom"
            assert steps[-1].startswith("actions/upload-artifact")


@pytest.mark.parametrize("target", sorted(EXPECTED))
def test_make_target_exists(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Nothing to be done" not in done.stdout  # a phony target without a rule


def test_unknown_target_is_refused_by_make() -> None:
    done = subprocess.run(["make", "--dry-run", "no-such"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 2


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_may_only_read(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert not {"pull_request_target", "workflow_run"} & set(workflow[True])
    assert "secrets." not in path.read_text(encoding="utf-8")
    assert all(0 < job["timeout-minutes"] <= 90 and "permissions" not in job for job in workflow["jobs"].values())


def test_tests_run_on_every_supported_python() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    classifiers = [line.rpartition(" :: ")[2] for line in project["classifiers"] if "Python :: 3." in line]
    (matrix,) = [job["strategy"]["matrix"] for job in jobs() if "strategy" in job]
    assert matrix == {"python": classifiers}
    assert project["requires-python"] == f">={classifiers[0]}"


def test_pins_install_on_the_first_release_of_the_lowest_python() -> None:
    """Debian 12 has Python 3.11.2: a pin that needs 3.11.5 ends `make setup` there."""
    lowest = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    first = f"{lowest.removeprefix('>=')}.0"
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    refused, seen = [], 0
    for name, version in pins:
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # a tool of the release
        if found.version != version:
            continue  # the environment is older than the pin
        seen += 1
        if not SpecifierSet(found.metadata.get("Requires-Python", "")).contains(first):
            refused.append(f"{name} {version}: {found.metadata['Requires-Python']}")
    assert refused == []
    assert seen > 100


def test_version_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["dynamic"] == ["version"]
    assert "version" not in project
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == bigbatch.__version__
    assert citation["license"] == project["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]
