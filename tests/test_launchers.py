"""The launchers in examples/launchers: their shell is valid, and what can run here runs."""

import ast
import importlib.util
import os
import random
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from bigbatch.cli import main
from support.language_models import records, save_model_folder, write_jsonl
from support.torchrun_agents import completed_torchrun

FOLDER = Path(__file__).parents[1] / "examples" / "launchers"
SHELL = ("torchrun.sh", "slurm.sbatch")
QUICK = [
    "--steps=2", "--device=cpu", "--global-batch=4", "--microbatch=2", "--max-length=32", "--timeout-s=120",
    "--sample-prompt=x", "--model=base", "--data=data.jsonl", "--no-cache",
]  # fmt: skip


def free_port() -> int:
    """Return a port of 20,000 to 32,767, from which systems take none by themselves."""
    while True:
        port = random.randrange(20_000, 32_768)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


def check_shell(text: str) -> None:
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def launch(words: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    save_model_folder(folder / "base")
    write_jsonl(folder / "data.jsonl", records(20))
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_every_launcher_is_checked() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*SHELL, "ray_cluster.py", "skypilot.yaml"}


@pytest.mark.parametrize("name", SHELL)
def test_shell_is_valid(name: str) -> None:
    check_shell((FOLDER / name).read_text(encoding="utf-8"))


def test_skypilot_task_is_valid() -> None:
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text(encoding="utf-8"))
    assert set(task) == {"name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run"}
    check_shell(task["setup"])
    check_shell(task["run"])


@pytest.mark.slow
def test_torchrun_script_trains(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = launch(
        [str(FOLDER / "torchrun.sh"), *QUICK],
        tmp_path,
        HOST="127.0.0.1",
        PORT=str(free_port()),
        NODES="1",
        PROCESSES="2",
        RUN=str(run),
    )
    assert done.returncode == 0, done.stderr
    assert (run / "model" / "config.json").exists()


def test_torchrun_script_names_what_is_missing(tmp_path: Path) -> None:
    done = launch([str(FOLDER / "torchrun.sh")], tmp_path, NODES="2")
    assert done.returncode == 1
    assert done.stderr.endswith("HOST: set HOST to the address of one of the hosts\n")


@pytest.mark.slow
def test_slurm_job_trains_and_a_later_one_resumes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without Slurm: `srun` runs its command once, and `scontrol` names this host."""
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": 'shift; exec "$@"', "scontrol": 'echo "$@" >> scontrol.txt; echo 127.0.0.1'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin" / "torchrun").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    (tmp_path / "bin" / "torchrun").chmod(0o755)  # prints the arguments of the agent, which is forked below
    run = tmp_path / "run"
    variables = {
        "SLURM_JOB_NAME": "bigbatch", "SLURM_JOB_ID": str(free_port() - 20_000), "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "here", "PROCESSES": "1", "RUN": str(run),
    }  # fmt: skip
    first = launch(["bash", str(FOLDER / "slurm.sbatch"), *QUICK], tmp_path, **variables)
    assert first.returncode == 0, first.stderr
    agent = completed_torchrun(first.stdout.splitlines(), tmp_path)
    assert agent.returncode == 0, agent.stderr
    assert (run / "model").exists()
    again = launch(["bash", str(FOLDER / "slurm.sbatch"), *QUICK], tmp_path, **variables)
    assert again.returncode == 0, again.stderr
    started = get_args_parser().parse_args(again.stdout.splitlines())
    assert (started.module, started.training_script) == (True, "bigbatch")
    capfd.readouterr()
    assert main(started.training_script_args) == 0
    assert f"{run} is already finished: all 2 updates are done, the model is saved" in capfd.readouterr().out
    assert "requeue" not in (tmp_path / "scontrol.txt").read_text(encoding="utf-8")


def test_ray_program_is_valid() -> None:
    ast.parse((FOLDER / "ray_cluster.py").read_text(encoding="utf-8"))


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray_program_trains(tmp_path: Path) -> None:
    program = [sys.executable, str(FOLDER / "ray_cluster.py"), "--nodes=2", "--same-node", "--"]
    done = launch([*program, *QUICK, "--out", str(tmp_path / "run")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model").exists()
