"""Reference runs, trained once per session."""

from pathlib import Path

import pytest

from support.distributed_runs import DROPPING, RunFolder, make_run_folder


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a folder with data and models."""
    return make_run_folder(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="session")
def alone(ground: RunFolder) -> str:
    """Return the name of the run on one rank."""
    ground.train("alone", 1, patch=ground.noting("alone"))
    return "alone"


@pytest.fixture(scope="session")
def undisturbed(ground: RunFolder) -> dict[str, Path]:
    """Return uninterrupted runs of two ranks with dropout, by --parallel."""
    for parallel in ("ddp", "fsdp"):
        ground.train(f"undisturbed-{parallel}", 2, *DROPPING, "--parallel", parallel)
    return {parallel: ground.folder / f"undisturbed-{parallel}" for parallel in ("ddp", "fsdp")}
