"""Reference runs, trained once per session."""

from pathlib import Path

import pytest

from support.distributed_runs import DROPPING, RunFolder, make_run_folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a folder with data and models."""
    return make_run_folder(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="session")
def alone(run_folder: RunFolder) -> str:
    """Return the name of the run on one rank."""
    run_folder.train("alone", 1, patch=run_folder.noting("alone"))
    return "alone"


@pytest.fixture(scope="session")
def uninterrupted(run_folder: RunFolder) -> dict[str, Path]:
    """Return uninterrupted runs of two ranks with dropout, by --parallel."""
    for parallel in ("ddp", "fsdp"):
        run_folder.train(f"uninterrupted-{parallel}", 2, *DROPPING, "--parallel", parallel)
    return {parallel: run_folder.folder / f"uninterrupted-{parallel}" for parallel in ("ddp", "fsdp")}
