"""The marker ``slow``: members of a matrix that have it, and the line that says what `make test` left out.

@pytest.mark.parametrize("name", slow_except(OPTIMIZERS, "sgd"))
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Return one set of parameters with the marker ``slow``."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slow_except(members: Iterable[Any], *fast: Any) -> list[Any]:
    """Return the members of a matrix with the marker ``slow``, the named ones without it; a tuple has several values.

    Raises:
        ValueError: A member that shall stay fast does not exist, because it was renamed or removed.
    """
    found = list(members)
    if unknown := [member for member in fast if member not in found]:
        raise ValueError(f"{unknown} are not in this matrix, which has {found}: name a member that stays fast")
    values = [member if isinstance(member, tuple) else (member,) for member in found]
    return [member if member in fast else slow(*each) for member, each in zip(found, values, strict=True)]


class LeftOut:
    """Prints as the last line how many slow tests ``-m "not slow"`` has left out."""

    def __init__(self) -> None:
        self._number = 0

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """``-k`` deselects first, tests of any kind; ``-m "not slow"`` only slow ones."""
        self._number = len(items) if all(item.get_closest_marker("slow") for item in items) else 0

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Send the number from a worker of xdist to the process that prints; every worker has collected all tests."""
        if (output := getattr(session.config, "workeroutput", None)) is not None:
            output["left_out"] = self._number

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self._number = max(self._number, getattr(node, "workeroutput", {}).get("left_out", 0))

    def pytest_unconfigure(self, config: pytest.Config) -> None:
        terminal = config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None and self._number:
            tests = "test was" if self._number == 1 else "tests were"
            terminal.write_line(f"{self._number} slow {tests} left to make test-all, which runs every test")
