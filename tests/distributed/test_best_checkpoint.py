"""The best checkpoint and early stopping on several ranks: the choice of one process, also after a killed rank."""

import json
from pathlib import Path

import pytest
import torch

from support.distributed_runs import TIGHT, RunFolder, make_run_folder, max_relative_difference
from support.language_models import metrics
from support.rank_faults import kill_in_window, on, signal_in_update
from support.tiers import slow

WORDS = (
    "--lr", "1", "--schedule", "constant", "--warmup-steps", "20", "--validation-every", "1", "--early-stopping", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A folder with a run on one rank, which ends early."""
    torch.manual_seed(0)
    folder = make_run_folder(tmp_path_factory.mktemp("best"))
    folder.train("alone", 1, *WORDS)
    return folder


@pytest.mark.parametrize("parallel", ["ddp", slow("fsdp")])
def test_ranks_end_early_with_the_best_of_one_rank(folder: RunFolder, parallel: str) -> None:
    expected = metrics(folder.folder / "alone")
    assert 3 <= len(expected) < 20
    launch = folder.train(parallel, 2, *WORDS, "--parallel", parallel)
    found = metrics(folder.folder / parallel)
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert row["validation_loss"] == pytest.approx(other["validation_loss"], rel=TIGHT)
    best = min(expected, key=lambda row: row["validation_loss"])["step"]
    assert f"weights after update {best}, which has the lowest validation loss" in launch.stdout()
    assert {path.name for path in (folder.folder / parallel / "checkpoints").iterdir()} == {
        f"step-{best}",
        f"step-{len(expected)}",
    }
    assert max_relative_difference(folder.model(parallel), folder.model("alone")) < TIGHT


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_stopped_and_resumed_make_the_same_choice(folder: RunFolder, parallel: str) -> None:
    out = f"stopped-{parallel}"
    last = len(metrics(folder.folder / "alone"))
    folder.train(out, 2, *WORDS, "--parallel", parallel, patch=signal_in_update(last - 1), codes=75)
    folder.resume(out, 2)
    found, expected = metrics(folder.folder / out), metrics(folder.folder / "alone")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    assert max_relative_difference(folder.model(out), folder.model("alone")) < TIGHT
    state = json.loads(next(Path(folder.folder / out / "checkpoints").glob(f"step-{last}/state.json")).read_text())
    assert state["progress"]["validations_without_improvement"] == 2


def test_ranks_killed_and_resumed_make_the_same_choice(folder: RunFolder) -> None:
    last = len(metrics(folder.folder / "alone"))
    kill = on({1}, kill_in_window(last))
    with folder.launch("killed", 2, *WORDS, "--timeout-s", "30", patch=kill) as launch:
        assert launch.wait()[1] == -9
    folder.resume("killed", 2)
    found, expected = metrics(folder.folder / "killed"), metrics(folder.folder / "alone")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    assert max_relative_difference(folder.model("killed"), folder.model("alone")) < TIGHT
