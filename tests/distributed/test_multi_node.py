"""Two nodes, each a network namespace with its own address, and a network link that fails."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.distributed_runs import DROPPING, RunFolder
from support.forked_processes import wait_for
from support.run_comparison import differing_results
from support.torchrun_agents import forked_agent

WIRE = "wire"
PORT = 29400


@dataclass(frozen=True)
class Machine:
    """A network namespace, which lasts as long as a process."""

    pid: int
    address: str

    def words(self, *words: str) -> list[str]:
        """A command there."""
        return ["nsenter", f"--target={self.pid}", "--user", "--preserve-credentials", "--net", *words]

    def do(self, *words: str) -> None:
        subprocess.run(self.words(*words), check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    """Two of them with a wire; skipped where that is not allowed."""
    if missing := [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]:
        pytest.skip(f"network namespaces need {missing[0]}")
    with ExitStack() as stack:
        first = hold(stack, ["unshare", "--user", "--map-root-user", "--net"])
        inside = ["nsenter", f"--target={first.pid}", "--user", "--preserve-credentials"]
        second = hold(stack, [*inside, "unshare", "--net"])
        pair = Machine(first.pid, "10.111.0.1"), Machine(second.pid, "10.111.0.2")
        try:
            pair[0].do("ip", "link", "add", WIRE, "type", "veth", "peer", "name", WIRE, "netns", str(second.pid))
            for machine in pair:
                machine.do("ip", "address", "add", f"{machine.address}/24", "dev", WIRE)
                machine.do("ip", "link", "set", "lo", "up")
                machine.do("ip", "link", "set", WIRE, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network of one's own here: {error.stderr.strip()}")
        yield pair


def hold(stack: ExitStack, inside: list[str]) -> "subprocess.Popen[str]":
    """Keep a namespace until the end."""
    process = subprocess.Popen(
        [*inside, "sh", "-c", "echo there; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    stack.callback(process.communicate)  # closes its input, which ends it
    assert process.stdout is not None
    if process.stdout.readline() != "there\n":
        pytest.skip("namespaces of users and networks are not allowed here")
    return process


@pytest.mark.slow
def test_network_failure_inside_window_leaves_result_unchanged(
    run_folder: RunFolder,
    uninterrupted: dict[str, Path],
    machines: tuple[Machine, Machine],
) -> None:
    words = run_folder.words("cut", *DROPPING, "--timeout-s", "10")
    reached, pipe = run_folder.folder / "reached", run_folder.folder / "pipe"
    os.mkfifo(pipe)
    paths = [str(reached), str(pipe)]
    fault = f"rank_faults.on({{1}}, rank_faults.hold_in_window(6, *map(rank_faults.Path, {paths})))(rank)"
    logs = [run_folder.folder / f"machine-{number}" for number in (0, 1)]
    with ExitStack() as stack:
        agents = []
        for number, machine in enumerate(machines):
            flags = [
                *("--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"),
                *("--rdzv-endpoint", f"{machines[0].address}:{PORT}", "--rdzv-id", "cut"),
                *("--rdzv-conf", f"is_host={number == 0}", "--local-addr", machine.address),
            ]
            place = {"network_of": machine.pid, "interface": WIRE, "log": logs[number]}
            agents.append(stack.enter_context(forked_agent(flags, words, run_folder.folder, fault=fault, **place)))
        wait_for(agents[0], reached.exists)
        machines[0].do("ip", "link", "set", WIRE, "down")
        pipe.write_bytes(b"!")
        wait_for(agents[0], lambda: all("Timeout (0:00:10)!" in log.read_text() for log in logs))
        machines[0].do("ip", "link", "set", WIRE, "up")
        codes = [agent.wait(timeout=240) for agent in agents]
    assert codes == [0, 0], [log.read_text() for log in logs]
    printed = logs[0].read_text() + logs[1].read_text()
    assert printed.count("resuming cut after update 3\n") == 1
    assert differing_results(run_folder.folder / "cut", uninterrupted["ddp"]) == []
