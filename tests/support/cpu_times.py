"""The CPU seconds of every test, its fixtures and child processes included: ``pytest --cpu-times 20``, `make slowest`.

CPU seconds of a loaded machine compare with those of an idle one; wall-clock seconds do not.

    test       setup + call + teardown, in the test process and all its descendants
    file       the sum of its tests
    unmarked   tests of more than 4 s without the marker ``slow``: mark them, or keep them as the one of their kind
"""

import os
from collections import Counter
from pathlib import Path

import pytest

UNMARKED_LIMIT_S = 4.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def add_option(parser: pytest.Parser) -> None:
    """Add ``--cpu-times N``."""
    parser.addoption(
        "--cpu-times", type=int, default=0, metavar="N", help="list the N tests and files with the most CPU seconds"
    )


class CpuTimes:
    """Measures each phase of a test where it runs; the process that prints the summary adds them up.

    Args:
        number: How many tests and files are listed.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._tests: Counter[str] = Counter()
        self._slow: set[str] = set()
        self._before_s = 0.0

    def pytest_runtest_logstart(self) -> None:
        self._before_s = used_s()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> object:
        """Write the CPU seconds since the last phase into the report, which xdist sends to the controller."""
        report = yield
        now_s = used_s()
        report.cpu_s, self._before_s = now_s - self._before_s, now_s
        report.is_slow = item.get_closest_marker("slow") is not None
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._tests[report.nodeid] += report.cpu_s
        if report.is_slow:
            self._slow.add(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        files: Counter[str] = Counter()
        for test, seconds in self._tests.items():
            files[test.partition("::")[0]] += seconds
        terminalreporter.section(f"{self._tests.total():.0f} CPU seconds in {len(self._tests)} tests")
        for name, found in (("tests", self._tests), ("files", files)):
            terminalreporter.write_line(f"{name}:")
            for each, seconds in found.most_common(self._number):
                terminalreporter.write_line(f"{seconds:8.1f} s  {each}{' (slow)' if each in self._slow else ''}")
        limit = f"more than {UNMARKED_LIMIT_S:.0f} s without the marker slow"
        unmarked = [
            (test, s) for test, s in self._tests.most_common() if s > UNMARKED_LIMIT_S and test not in self._slow
        ]
        terminalreporter.write_line(f"{limit}:" if unmarked else f"no test used {limit}")
        for test, seconds in unmarked:
            terminalreporter.write_line(f"{seconds:8.1f} s  {test}")


def used_s() -> float:
    """Return the CPU seconds of this process and its descendants, also of those that have exited."""
    times = os.times()
    own_s = times.user + times.system + times.children_user + times.children_system
    return own_s + sum(seconds for seconds in _living_s(os.getpid()))


def _living_s(pid: int) -> list[float]:
    """Return the CPU seconds of each living descendant, with those of its own children that have exited."""
    parents: dict[int, list[int]] = {}
    seconds: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has just exited
            continue
        child = int(path.parent.name)
        parents.setdefault(int(fields[1]), []).append(child)
        seconds[child] = sum(map(int, fields[11:15])) / TICKS_PER_S
    found, todo = [], parents.get(pid, [])
    while todo:
        child = todo.pop()
        found.append(seconds[child])
        todo += parents.get(child, [])
    return found
