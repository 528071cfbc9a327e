"""Host memory for training state: control groups, reserve, and the refusal before a run starts."""

from pathlib import Path

import pytest
import torch

import bigbatch
from bigbatch.engine import host_check
from bigbatch.errors import MemoryLimitError
from bigbatch.memory import usage
from bigbatch.offload import host_memory
from bigbatch.offload.host_memory import available_host_bytes, check_host_memory

GIB = 2**30


@pytest.mark.parametrize(
    ("free_gib", "num_processes", "expected_gib"),
    [(1, 1, 0.75), (10, 1, 8.0), (10, 4, 2.0), (100, 1, 95.0)],
)
def test_reserve_is_kept_and_shared(
    free_gib: int, num_processes: int, expected_gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "host_memory", lambda: (free_gib * GIB, 200 * GIB))
    assert available_host_bytes(num_processes=num_processes) == int(expected_gib * GIB)


def test_control_group_limits_what_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "cgroup"
    group.mkdir()
    (group / "memory.max").write_text(f"{8 * GIB}\n")
    (group / "memory.current").write_text(f"{2 * GIB}\n")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/\n")
    (tmp_path / "proc" / "meminfo").write_text(f"MemAvailable: {64 * GIB // 1024} kB\n")
    within = usage._host_memory(tmp_path / "proc", group)
    monkeypatch.setattr(host_memory, "host_memory", lambda: within)
    assert available_host_bytes() == 4.5 * GIB  # 8 less 2 in use, less the reserve of a quarter


def test_what_fits_is_accepted() -> None:
    check_host_memory(GIB, GIB, level="optimizer")


def test_what_does_not_fit_is_refused_with_figures() -> None:
    with pytest.raises(MemoryLimitError) as caught:
        check_host_memory(12 * GIB, 8 * GIB, level="optimizer")
    assert str(caught.value) == (
        "offload optimizer needs 12.0 GiB of pinned host memory, and 8.0 GiB are available: use a lower level, or free "
        "host memory."
    )
    with pytest.raises(MemoryLimitError, match="memory for each of 8 processes, and "):
        check_host_memory(12 * GIB, 8 * GIB, level="optimizer", num_processes=8)


def linear_engine(level: str) -> bigbatch.Engine:
    model = torch.nn.Linear(1000, 1000, bias=False)
    return bigbatch.Engine(model, torch.optim.AdamW(model.parameters()), squares, microbatch=1, offload=level)


def squares(model: torch.nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, int]:
    return model(inputs).square().sum(), len(inputs)


@pytest.mark.parametrize(("level", "mib"), [("optimizer", 7.6), ("master", 11.4), ("gradients", 15.3)])
def test_engine_is_refused_before_its_first_window(level: str, mib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 bytes of AdamW's state for each of a million weights, 4 of its float32 value, and 4 of its gradient sum."""
    monkeypatch.setattr(host_memory, "host_memory", lambda: (4 * 2**20, 200 * GIB))
    with pytest.raises(MemoryLimitError) as caught:
        linear_engine(level)
    assert str(caught.value) == (
        f"offload {level} needs {mib} MiB of pinned host memory, and 3.0 MiB are available: use a lower level, or free "
        "host memory."
    )
    linear_engine("none").step(torch.ones(2, 1000))
    monkeypatch.setattr(host_memory, "host_memory", lambda: (GIB, 200 * GIB))
    linear_engine(level)


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "host_memory", lambda: (40 * 2**20, 200 * GIB))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    linear_engine("optimizer")  # without a process group there is one process
    monkeypatch.setattr(host_check, "_has_ranks", lambda: True)
    with pytest.raises(MemoryLimitError) as caught:
        linear_engine("optimizer")
    assert str(caught.value) == (
        "offload optimizer needs 7.6 MiB of pinned host memory for each of 4 processes, and 7.5 MiB are available: use "
        "a lower level, or free host memory."
    )
