"""The wheel without extras, in an empty environment: torch and nothing else."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, Installation

# torch says so when it is imported without numpy, which neither it nor the core needs.
NO_NUMPY = "ignore:Failed to initialize NumPy:UserWarning"
COMMANDS = [
    "train",
    "resume RUN",
    "plan",
    "inspect",
    "tokenize",
    "verify",
    "generate RUN",
    "merge RUN",
    "checkpoints RUN",
]
COMMANDS += ["advise RUN", "diff RUN RUN", "report RUN", "cache", "bench"]
MODULES = """
import importlib, pkgutil
import bigbatch
outside = ("bigbatch.lm", "bigbatch.cli", "bigbatch.integrations", "bigbatch.__main__")
names = [module.name for module in pkgutil.walk_packages(bigbatch.__path__, "bigbatch.", onerror=lambda name: None)]
names = [name for name in names if not name.startswith(outside)]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_core_installs_torch_and_no_other_library(core: Installation) -> None:
    code = "import importlib.metadata as m; print(*sorted({d.name.lower() for d in m.distributions()}))"
    installed = set(core.output("python", "-c", code).split())
    assert {"bigbatch", "torch"} <= installed
    trainer = {"transformers", "tokenizers", "datasets", "peft", "pydantic", "rich", "numpy", "pyarrow", "accelerate"}
    assert not installed & trainer


def test_package_is_that_of_the_wheel(core: Installation, wheel: Path) -> None:
    found = core.output("python", "-c", "import bigbatch; print(bigbatch.__version__, bigbatch.__file__)").split()
    assert found[0] == wheel.name.split("-")[1]
    assert Path(found[1]).is_relative_to(core.python.parents[1])


def test_import_raises_no_warning(core: Installation) -> None:
    core.output("python", "-W", "error", "-c", "import bigbatch")


def test_every_core_module_imports_without_warning(core: Installation) -> None:
    assert int(core.output("python", "-W", "error", "-W", NO_NUMPY, "-c", MODULES)) > 100


def test_example_of_readme_runs_without_warning(core: Installation) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert "engine.step(" in example
    printed = core.output("python", "-W", "error", "-W", NO_NUMPY, "-c", example)
    assert printed.endswith("exact: every cut gives the full-batch gradient\n")


def test_help_and_version_need_no_extra(core: Installation, wheel: Path) -> None:
    assert "bigbatch train" in core.output("bigbatch", "--help")
    assert core.output("bigbatch", "--version") == f"bigbatch {wheel.name.split('-')[1]}\n"
    assert core.output("python", "-m", "bigbatch", "--version") == f"bigbatch {wheel.name.split('-')[1]}\n"


def test_every_command_is_tried(core: Installation) -> None:
    listed = core.output("python", "-c", "from bigbatch.cli import COMMANDS; print(*COMMANDS)").split()
    assert [command.split()[0] for command in COMMANDS] == listed


@pytest.mark.parametrize("command", COMMANDS)
def test_command_says_what_to_install(core: Installation, command: str) -> None:
    done = core.run("bigbatch", *command.split())
    name = command.split()[0]
    assert done.stderr == f'bigbatch {name}: pydantic is not installed: pip install "bigbatch[train]".\n'
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_wheel_compiles_on_newer_python(wheel: Path, tmp_path: Path, version: str) -> None:
    """Without torch: what needs none runs there, and every module compiles. The whole suite runs on the forge."""
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "--version"], capture_output=True, check=False).returncode:
        pytest.skip(f"Python {version} is not installed")
    environment = tmp_path / "environment"
    subprocess.run([python, "-m", "venv", "--without-pip", environment], check=True)
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, wheel], check=True)
    installed = Installation(environment / "bin" / "python", tmp_path)
    installed.output("python", "-W", "error", "-c", "import bigbatch")
    assert "bigbatch train" in installed.output("bigbatch", "--help")
    (package,) = environment.glob("lib/python*/site-packages/bigbatch")
    installed.output("python", "-W", "error", "-m", "compileall", "-q", "-f", package)
