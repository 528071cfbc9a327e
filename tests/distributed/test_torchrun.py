"""A real torchrun agent with `bigbatch train`: it starts and restarts ranks and forwards signals."""

import os
import signal
from pathlib import Path

import pytest

from support import rank_faults
from support.distributed_runs import DROPPING, RunFolder
from support.forked_processes import wait_for
from support.language_models import metrics
from support.run_comparison import differing_results
from support.torchrun_agents import LIMIT_S, torchrun
from support.torchrun_ranks import run


def ours(complained: str) -> list[str]:
    """What the ranks wrote to stderr, without what torchrun reports of them."""
    return [line for line in complained.splitlines() if line.startswith("bigbatch ")]


@pytest.mark.slow
def test_run_survives_kill_9_of_a_rank_and_ctrl_c(run_folder: RunFolder, uninterrupted: dict[str, Path]) -> None:
    """The agent restarts ranks of either kind by the same means; test_train_command.py kills ranks of both."""
    out, reached = "torchrun-fsdp", run_folder.folder / "held"
    words = run_folder.words(out, *DROPPING, "--parallel", "fsdp")
    flags = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    fault = "rank_faults.on({1}, rank_faults.kill_in_window(6))(rank)"
    later = f"rank_faults.on({{1}}, rank_faults.wait_for_signal_in_window(7, rank_faults.Path({str(reached)!r})))(rank)"
    with torchrun(flags, words, run_folder.folder, fault=fault, later=later) as process:
        wait_for(process, reached.exists)  # by a rank that the agent has started again
        os.killpg(process.pid, signal.SIGINT)
        printed, complained = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    assert [(run_folder.folder / f"ended-1-{rank}").read_text() for rank in (0, 1)] == ["75", "75"]
    assert f"resuming {out} after update 3\n" in printed
    assert "stopped by Ctrl-C after update 7 of 8; the model is saved\n" in printed
    assert all("has lost another rank" in line for line in ours(complained)), complained
    assert complained.count("stopping after this update, then saving; signal again to stop immediately") == 1
    assert (run_folder.folder / out / "model" / "model.safetensors").exists()
    assert len(metrics(run_folder.folder / out)) == 7
    run_folder.resume(out, 2)
    assert differing_results(run_folder.folder / out, uninterrupted["fsdp"]) == []


def test_restart_without_deterministic_has_same_bits_on_cpus(
    run_folder: RunFolder, uninterrupted: dict[str, Path]
) -> None:
    """All other runs of these tests pass --deterministic."""
    out, folder = run_folder.folder / "killed-otherwise", run_folder.folder
    words = [word for word in run_folder.words(out.name, *DROPPING, "--parallel", "ddp") if word != "--deterministic"]
    dies = rank_faults.on({1}, rank_faults.kill_in_window(6))
    run(words, 2, folder=folder, codes=[1, -signal.SIGKILL], patch=dies, max_restarts=2)
    again = run(words, 2, folder=folder, restart=1, max_restarts=2)
    assert f"resuming {out.name} after update 3\n" in again.stdout()
    one, two = ([(row["step"], row["loss"]) for row in metrics(each)] for each in (out, uninterrupted["ddp"]))
    assert len(one) == 8
    assert one == two
    models = [(each / "model" / "model.safetensors").read_bytes() for each in (out, uninterrupted["ddp"])]
    assert models[0] == models[1]
