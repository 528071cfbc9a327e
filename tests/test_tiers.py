"""The tiers of the suite: `make test` leaves out the tests marked slow and says so, `make test-all` and CI run all."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.cpu_times import CpuTimes
from support.tiers import LeftOut, slow, slow_except

ROOT = Path(__file__).parents[1]


def is_slow(value: Any) -> bool:
    return [mark.name for mark in getattr(value, "marks", ())] == ["slow"]


def recipe(target: str, *words: str) -> str:
    command = ["make", "--dry-run", target, *words]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


class Terminal:
    """Records what a summary writes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write_line(self, line: str) -> None:
        self.lines.append(line)

    section = write_line


def test_named_members_of_a_matrix_stay_fast() -> None:
    members = slow_except({"a": 0, "b": 1, "c": 2}, "b")
    assert [is_slow(member) for member in members] == [True, False, True]
    assert [member.values for member in members if is_slow(member)] == [("a",), ("c",)]
    assert slow_except([("a", 1), ("b", 2)], ("a", 1)) == [("a", 1), slow("b", 2)]
    assert slow("b", 2).values == ("b", 2)


def test_renamed_member_is_reported() -> None:
    with pytest.raises(ValueError, match=re.escape("['z'] are not in this matrix, which has ['a', 'b']")):
        slow_except("ab", "z")


def test_make_test_alone_leaves_slow_tests_out() -> None:
    assert '-m "not slow" -k offload\n' in recipe("test", "ARGS=-k offload")
    for target in ("test-all", "slowest"):
        assert "-m pytest" in recipe(target)
        assert "not slow" not in recipe(target)
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()[4] == "make test-all"
    assert "addopts" in (settings := (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "not slow" not in settings


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["one process", "a worker"])
def test_last_line_counts_what_was_left_out(workers: list[str]) -> None:
    words = [*workers, "-m", "not slow", "-k", "installed_into or bundled", "tests/test_bootstrap_pip.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "1 slow test was left to make test-all, which runs every test"


def test_tests_that_a_keyword_leaves_out_are_not_counted() -> None:
    items = [SimpleNamespace(get_closest_marker=lambda _, found=found: found) for found in (None, "slow", "slow")]
    left_out, terminal = LeftOut(), Terminal()
    config: Any = SimpleNamespace(pluginmanager=SimpleNamespace(get_plugin=lambda _: terminal))
    left_out.pytest_deselected(items)  # type: ignore[arg-type]
    left_out.pytest_unconfigure(config)
    assert terminal.lines == []
    left_out.pytest_deselected(items[1:])  # type: ignore[arg-type]
    left_out.pytest_unconfigure(config)
    assert terminal.lines == ["2 slow tests were left to make test-all, which runs every test"]


def test_unmarked_tests_of_many_cpu_seconds_are_named() -> None:
    times: Any = CpuTimes(3)
    for name, seconds, is_slow in (("a", 3.0, False), ("a", 1.5, False), ("b", 9.0, True), ("c", 4.0, False)):
        times.pytest_runtest_logreport(SimpleNamespace(nodeid=f"test_x.py::{name}", cpu_s=seconds, is_slow=is_slow))
    terminal = Terminal()
    times.pytest_terminal_summary(terminal)
    assert "     9.0 s  test_x.py::b (slow)" in terminal.lines
    assert terminal.lines[-2:] == ["more than 4 s without the marker slow:", "     4.5 s  test_x.py::a"]
