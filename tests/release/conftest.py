"""Environments with nothing but the built wheel and what it needs; `make test-release` builds it before.

They are in .venv/release and are created again by every call.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / ".ci"))

from bill_of_materials import create_environment, find_wheel  # noqa: E402  its folder is no package

ENVIRONMENTS = ROOT / ".venv" / "release"
COMMAND_S = 900


class Installation:
    """An environment with the wheel.

    Args:
        python: Its interpreter.
        folder: The working directory of what runs in it, outside of the checkout.
    """

    def __init__(self, python: Path, folder: Path) -> None:
        self.python = python
        self._folder = folder

    def run(self, *words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment, `python` or `bigbatch`, without the variables of the caller."""
        program, *rest = words
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        environment |= {"HOME": str(self._folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [self.python.parent / program, *rest], cwd=cwd or self._folder, env=environment,
            check=False, capture_output=True, text=True, timeout=COMMAND_S,
        )  # fmt: skip

    def output(self, *words: str | Path, cwd: Path | None = None) -> str:
        """Return what a command prints, once it has ended with 0."""
        done = self.run(*words, cwd=cwd)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def wheel() -> Path:
    return find_wheel(ROOT / "dist")


def _install(name: str, requirement: str, folder: Path) -> Installation:
    environment = ENVIRONMENTS / name
    environment.parent.mkdir(parents=True, exist_ok=True)
    return Installation(create_environment(environment, requirement), folder)


@pytest.fixture(scope="session")
def core(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The wheel without extras."""
    return _install("core", str(wheel), tmp_path_factory.mktemp("core"))


@pytest.fixture(scope="session")
def train(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The wheel with the extra of the language-model trainer."""
    return _install("train", f"{wheel}[train]", tmp_path_factory.mktemp("train"))
