"""What torchrun itself does with `bigbatch train`: it starts ranks, starts them again, and passes signals on."""

import os
import signal
from pathlib import Path

import pytest
from tests.distributed.agents import LIMIT_S, torchrun, torchrun_to_its_end, wait_for
from tests.distributed.runs import DROPPING, Ground

from lm.helpers import metrics
from lm.killing import unlike


def ours(complained: str) -> list[str]:
    """What the ranks wrote to stderr, without what torchrun reports of them."""
    return [line for line in complained.splitlines() if line.startswith("bigbatch ")]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_kill_9_of_a_rank_leaves_no_trace(ground: Ground, undisturbed: dict[str, Path], parallel: str) -> None:
    out = f"torchrun-{parallel}"
    words = ground.words(out, *DROPPING, "--parallel", parallel)
    flags = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    trouble = "trouble.on({1}, trouble.kill_in_window(6))(rank)"
    code, printed, complained = torchrun_to_its_end(flags, words, ground.folder, trouble=trouble)
    assert code == 0, complained
    assert f"resuming {out} after update 3\n" in printed
    assert printed.count("update 8/8 ") == 1
    assert all("has lost another rank" in line for line in ours(complained)), complained
    assert unlike(ground.folder / out, undisturbed[parallel]) == []


def test_ctrl_c_reaches_every_rank_once_and_all_save(ground: Ground, undisturbed: dict[str, Path]) -> None:
    out = ground.folder / "interrupted"
    words = ground.words("interrupted", *DROPPING, "--steps", "2000", "--checkpoint-every", "500")
    with torchrun(["--standalone", "--nproc-per-node", "2"], words, ground.folder) as process:
        wait_for(process, lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) >= 3)
        os.killpg(process.pid, signal.SIGINT)
        printed, complained = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    assert [(ground.folder / f"ended-0-{rank}").read_text() for rank in (0, 1)] == ["75", "75"]
    step = len(metrics(out))
    assert f"stopped by Ctrl-C after update {step} of 2000; the model is saved\n" in printed
    assert complained.count("stopping after this update, then saving; signal again to stop immediately") == 1
    assert (out / "model" / "model.safetensors").exists()
