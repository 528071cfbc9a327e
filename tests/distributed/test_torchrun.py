"""Real torchrun agents with `bigbatch train`: they start and restart ranks and forward signals."""

import os
import signal
from pathlib import Path

from support import rank_faults
from support.distributed_runs import DROPPING, RunFolder
from support.language_models import metrics
from support.run_comparison import differing_results
from support.torchrun_agents import LIMIT_S, run_torchrun, torchrun, wait_for
from support.torchrun_ranks import run


def ours(complained: str) -> list[str]:
    """What the ranks wrote to stderr, without what torchrun reports of them."""
    return [line for line in complained.splitlines() if line.startswith("bigbatch ")]


def test_kill_9_of_rank_leaves_result_unchanged(run_folder: RunFolder, uninterrupted: dict[str, Path]) -> None:
    """The agent restarts ranks of either kind by the same means; test_train_command.py kills ranks of both."""
    out = "torchrun-fsdp"
    words = run_folder.words(out, *DROPPING, "--parallel", "fsdp")
    flags = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    fault = "rank_faults.on({1}, rank_faults.kill_in_window(6))(rank)"
    code, printed, complained = run_torchrun(flags, words, run_folder.folder, fault=fault)
    assert code == 0, complained
    assert f"resuming {out} after update 3\n" in printed
    assert printed.count("update 8/8 ") == 1
    assert all("has lost another rank" in line for line in ours(complained)), complained
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


def test_ctrl_c_reaches_every_rank_and_all_save(run_folder: RunFolder, uninterrupted: dict[str, Path]) -> None:
    out = run_folder.folder / "interrupted"
    words = run_folder.words("interrupted", *DROPPING[:2], "--steps", "2000", "--checkpoint-every", "500")
    with torchrun(["--standalone", "--nproc-per-node", "2"], words, run_folder.folder) as process:
        wait_for(process, lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) >= 3)
        os.killpg(process.pid, signal.SIGINT)
        printed, complained = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    assert [(run_folder.folder / f"ended-0-{rank}").read_text() for rank in (0, 1)] == ["75", "75"]
    step = len(metrics(out))
    assert f"stopped by Ctrl-C after update {step} of 2000; the model is saved\n" in printed
    assert complained.count("stopping after this update, then saving; signal again to stop immediately") == 1
    assert (out / "model" / "model.safetensors").exists()
