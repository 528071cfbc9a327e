"""The CPU cores that a process may use: those of its affinity, as far as the CPU quotas of its control groups allow.

sched_getaffinity, cpu.max (v2), cpu.cfs_quota_us (v1), ranks of this machine → number of threads
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bigbatch.lm.text import plural


@dataclass(frozen=True)
class CpuCores:
    """Cores of a process.

    Attributes:
        affinity: Cores on which it may run.
        quota: Seconds of CPU time per second that its control groups allow; None without a limit.
    """

    affinity: int
    quota: float | None = None

    @property
    def usable(self) -> int:
        """Threads that can run at a time: at least 1; of a quota of 2.5 cores, 2, so that none of them is throttled."""
        return self.affinity if self.quota is None else max(1, min(self.affinity, int(self.quota)))


def cpu_cores(root: Path = Path("/")) -> CpuCores:
    """Return the cores that this process may use.

    Args:
        root: Where the file systems ``proc`` and ``sys`` are.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return CpuCores(affinity, min(_quotas(root), default=None))


def share_threads(cores: CpuCores, processes: int) -> str | None:
    """Reduce the threads of torch to this process's share of the cores, if it has more; return a sentence if it had.

    Args:
        cores: Of this machine.
        processes: Processes of the run on this machine, this one included.
    """
    import torch

    share, before = max(1, cores.usable // processes), torch.get_num_threads()
    if before <= share:
        return None
    torch.set_num_threads(share)
    quota = "" if cores.usable == cores.affinity else f", of {cores.affinity} by the CPU quota of the control group"
    sharing = "" if processes == 1 else f"; {processes} processes share them"
    return f"{plural(share, 'CPU thread')} instead of {before}: {plural(cores.usable, 'usable core')}{quota}{sharing}"


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quotas of the control groups of this process and of those around them."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # v2
                mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
            elif "cpu" in controllers.split(","):
                mounts = [root / "sys/fs/cgroup" / name for name in (controllers, "cpu")]
            else:
                continue
            # In a container without a namespace for control groups, only the root of the path exists.
            group = Path(path.strip("/"))
            for folder in (mount / part for mount in mounts for part in (group, *group.parents)):
                if (quota := _quota(folder)) is not None:
                    yield quota


def _quota(folder: Path) -> float | None:
    """Return the quota of one control group; None without one."""
    with suppress(OSError, ValueError):
        if (limits := folder / "cpu.max").exists():
            quota, period = limits.read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(quota) > 0:  # "max" in v2 and -1 in v1 are no limit
            return int(quota) / int(period)
    return None
