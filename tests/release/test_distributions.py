"""The checks of `make dist` and `make sbom` refuse what must not be published."""

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from .conftest import ROOT

from bill_of_materials import find_wheel, problems  # isort: skip
from distributions import REQUIRED, differences, git, sdist_problems, wheel_problems  # isort: skip

WHEEL, SDIST = "bigbatch-1.0-py3-none-any.whl", "bigbatch-1.0.tar.gz"
TRACKED = {f"src/{name}": name.encode() for name in REQUIRED} | {"README.md": b"# bigbatch"}
METADATA = {f"bigbatch-1.0.dist-info/{name}": b"" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")}
PACKED = {name: name.encode() for name in REQUIRED} | METADATA | {"bigbatch-1.0.dist-info/licenses/LICENSE": b""}


def write_wheel(folder: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return folder / WHEEL


def write_sdist(folder: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(folder / SDIST, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"bigbatch-1.0/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return folder / SDIST


def test_complete_wheel_has_no_problem(tmp_path: Path) -> None:
    assert wheel_problems(write_wheel(tmp_path, PACKED), TRACKED) == []


@pytest.mark.parametrize("name", [*REQUIRED, "bigbatch-1.0.dist-info/licenses/LICENSE"])
def test_missing_file_of_wheel_is_named(tmp_path: Path, name: str) -> None:
    wheel = write_wheel(tmp_path, {key: data for key, data in PACKED.items() if key != name})
    assert wheel_problems(wheel, TRACKED) == [f"{WHEEL} lacks {name}."]


def test_marker_of_types_is_required_though_untracked(tmp_path: Path) -> None:
    without = [{key: data for key, data in files.items() if "py.typed" not in key} for files in (PACKED, TRACKED)]
    assert wheel_problems(write_wheel(tmp_path, without[0]), without[1]) == [f"{WHEEL} lacks bigbatch/py.typed."]


def test_tests_in_wheel_are_refused(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, PACKED | {"tests/conftest.py": b""})
    assert wheel_problems(wheel, TRACKED) == [f"{WHEEL} has tests/conftest.py, which is no part of the package."]


def test_changed_file_of_wheel_is_named(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, PACKED | {"bigbatch/lm/report/style.css": b"old"})
    assert wheel_problems(wheel, TRACKED) == [f"bigbatch/lm/report/style.css in {WHEEL} differs from the repository."]


def test_sdist_has_every_tracked_file_and_no_other(tmp_path: Path) -> None:
    assert sdist_problems(write_sdist(tmp_path, TRACKED | {"PKG-INFO": b""}), TRACKED) == []
    files = {name: data for name, data in TRACKED.items() if name != "README.md"}
    sdist = write_sdist(tmp_path, files | {"secret.txt": b"", "src/bigbatch/py.typed": b"other"})
    assert sdist_problems(sdist, TRACKED) == [
        f"{SDIST} lacks PKG-INFO.",
        f"{SDIST} lacks README.md.",
        f"{SDIST} has secret.txt, which is not in the repository.",
        f"src/bigbatch/py.typed in {SDIST} differs from the repository.",
    ]


def test_builds_that_differ_are_named(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        write_wheel(folder, PACKED)
    assert differences(first, second) == []
    write_wheel(second, PACKED | {"bigbatch/py.typed": b"partial"})
    (first / SDIST).touch()
    assert differences(first, second) == [
        f"{WHEEL} differs between two builds of one commit.",
        f"{SDIST} exists in one of two builds.",
    ]


def test_times_in_distributions_are_those_of_the_commit(wheel: Path) -> None:
    committed = int(git("log", "-1", "--format=%ct"))
    with tarfile.open(*wheel.parent.glob("bigbatch-*.tar.gz")) as archive:
        assert {member.mtime for member in archive} == {committed}


def test_folder_without_wheel_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has 0 wheels of bigbatch: run make dist\."):
        find_wheel(tmp_path)


def component(name: str, version: str) -> dict[str, str]:
    return {"type": "library", "name": name, "version": version, "bom-ref": name}


BILL = {
    "bomFormat": "CycloneDX",
    "specVersion": "1.6",
    "components": [component("torch", "2.13.0"), component("transformers", "5.23.0")],
}


def test_complete_bill_has_no_problem() -> None:
    assert problems(json.dumps(BILL)) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"components": [component("torch", "2.13.0")]}, "the bill lacks transformers."),
        (
            {"components": [*BILL["components"], component("pip", "26.1")]},
            "pip in the bill is no dependency of bigbatch.",
        ),
        ({"components": [*BILL["components"], component("rich", "")]}, "rich has no version."),
        (
            {"externalReferences": [{"type": "website", "url": "file:///home/someone"}]},
            "the bill has the path of a file on this machine.",
        ),
    ],
)
def test_problem_of_bill_is_named(change: dict[str, object], expected: str) -> None:
    assert problems(json.dumps(BILL | change)) == [expected]


def test_invalid_bill_is_refused() -> None:
    (problem,) = problems(json.dumps(BILL | {"bomFormat": "SPDX"}))
    assert problem.startswith("the bill is not valid CycloneDX 1.6: ")


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("vendor.citation-file-format", "CITATION.cff"),
        ("vendor.github-workflows", ".github/workflows/*.yml"),
        ("vendor.github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
        ("vendor.dependabot", ".github/dependabot.yml"),
    ],
)
def test_files_for_the_forge_are_valid(schema: str, pattern: str) -> None:
    files = sorted(ROOT.glob(pattern))
    assert files
    command = [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", schema, *files]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
