"""Usable cores are those of the affinity and of every CPU quota, shared by the processes of a machine."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bigbatch.lm.cpu_cores import CpuCores, cpu_cores, share_threads

AFFINITY = len(os.sched_getaffinity(0))
CPU = "sys/fs/cgroup/cpu,cpuacct"


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "rubbish\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 0.5),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "800000 100000\n",
            },
            2.0,
        ),
        ({"proc/self/cgroup": "0::/not/seen/here\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/x\n0::/\n",
                f"{CPU}/x/cpu.cfs_quota_us": "250000\n",
                f"{CPU}/x/cpu.cfs_period_us": "100000\n",
                f"{CPU}/cpu.cfs_quota_us": "-1\n",
                f"{CPU}/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/x:y\n",
                "sys/fs/cgroup/cpu/x:y/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu/x:y/cpu.cfs_period_us": "50000\n",
            },
            2.0,
        ),
        ({"proc/self/cgroup": "1:cpuset:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "1\n"}, None),
    ],
)
def test_smallest_quota_around_process_counts(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert cpu_cores(tmp_path) == CpuCores(AFFINITY, quota)


@pytest.mark.parametrize(
    ("cores", "usable"),
    [(CpuCores(4), 4), (CpuCores(4, 2.5), 2), (CpuCores(4, 0.5), 1), (CpuCores(2, 8.0), 2)],
)
def test_quota_is_rounded_down_to_whole_cores(cores: CpuCores, usable: int) -> None:
    assert cores.usable == usable


def test_affinity_of_this_process_counts() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert cpu_cores().affinity == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("cores", "processes", "threads", "sentence"),
    [
        (CpuCores(4), 1, 4, None),
        (CpuCores(8), 2, 4, None),
        (
            CpuCores(16, 2.0),
            1,
            2,
            "2 CPU threads instead of 4: 2 usable cores, of 16 by the CPU quota of the control group",
        ),
        (CpuCores(8), 3, 2, "2 CPU threads instead of 4: 8 usable cores; 3 processes share them"),
        (CpuCores(1), 8, 1, "1 CPU thread instead of 4: 1 usable core; 8 processes share them"),
    ],
)
def test_threads_are_reduced_to_the_share(cores: CpuCores, processes: int, threads: int, sentence: str | None) -> None:
    assert share_threads(cores, processes) == sentence
    assert torch.get_num_threads() == threads
