"""Runs to compare others with, made once for all tests of a session."""

from pathlib import Path

import pytest
from tests.distributed.runs import DROPPING, Ground, make_ground


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    """A folder with data and models."""
    return make_ground(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="session")
def alone(ground: Ground) -> str:
    """The run on one rank."""
    ground.train("alone", 1, patch=ground.noting("alone"))
    return "alone"


@pytest.fixture(scope="session")
def undisturbed(ground: Ground) -> dict[str, Path]:
    """Runs of two ranks with dropout, by how the model is spread."""
    for parallel in ("ddp", "fsdp"):
        ground.train(f"undisturbed-{parallel}", 2, *DROPPING, "--parallel", parallel)
    return {parallel: ground.folder / f"undisturbed-{parallel}" for parallel in ("ddp", "fsdp")}
