"""Kernels of notebooks in forks of the loaded process: they import neither torch nor transformers again.

with forked_kernels():
    make_notebooks.execute(notebook)
"""

import os
import runpy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from jupyter_client.provisioning import local_provisioner

from support.forked_processes import ForkedProcess

STARTED = "started\n"


@contextmanager
def forked_kernels() -> Iterator[None]:
    """Fork the kernels that are launched within the context."""
    with mock.patch.object(local_provisioner, "launch_kernel", _ForkedKernel):
        yield


class _ForkedKernel(ForkedProcess):
    """The part of `subprocess.Popen` that a provisioner uses."""

    stdin = None

    def __init__(self, command: list[str], *, env: dict[str, str], cwd: str, **_: Any) -> None:
        super().__init__(_run, command, env, folder=Path(cwd))
        assert self.stdout.readline() == STARTED  # its process group is its own: a provisioner kills the group


def _run(command: list[str], environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)
    for action in environment.get("PYTHONWARNINGS", "").split(","):  # an interpreter reads them when it starts
        if action:
            warnings.filterwarnings(*action.split(":"))
    print(STARTED, end="", flush=True)
    name = command[command.index("-m") + 1]
    sys.argv = [name, *command[command.index(name) + 1 :]]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
