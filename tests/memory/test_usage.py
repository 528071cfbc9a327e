"""What memory there is: of the machine, of containers around the process, and as it is asked for."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bigbatch
from bigbatch.memory import usage
from bigbatch.memory.limit import MIB, parse_memory
from bigbatch.memory.usage import MemoryBudget, is_out_of_memory, peak_bytes, resolve_memory_budget, restart_peak

CPU = torch.device("cpu")
PAGE = os.sysconf("SC_PAGE_SIZE")
TOTAL = PAGE * os.sysconf("SC_PHYS_PAGES")
NOWHERE = Path("/nowhere at all")


# Room -------------------------------------------------------------------------------------------------------------


def test_budget_keeps_five_percent_free() -> None:
    assert MemoryBudget.from_limit(1000, "1000B") == MemoryBudget(1000, 950, "1000B")
    assert MemoryBudget.from_limit(1000, None, reserved_bytes=200) == MemoryBudget(1000, 760, None)


@pytest.mark.parametrize("others_bytes", [1000, 1001, 10**15])
def test_budget_is_never_negative(others_bytes: int) -> None:
    assert MemoryBudget.from_limit(1000, "1000B", reserved_bytes=others_bytes).usable_bytes == 0
    assert MemoryBudget.from_limit(0, None).usable_bytes == 0


def test_budget_names_its_source() -> None:
    assert (
        str(MemoryBudget.from_limit(2**31, "2GiB"))
        == "memory is limited to 2GiB, of which 1.9 GiB are usable for tensors"
    )
    assert (
        str(MemoryBudget.from_limit(2**31, None))
        == "memory is limited to 2.0 GiB (free memory less a margin), of which 1.9 GiB are usable for tensors"
    )


# find_room --------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Of this process, now: the bound of what others can be."""
    return usage._resident_bytes()


def tensors(num_bytes: int) -> list[torch.Tensor]:
    """Held tensors that are really there."""
    return [torch.ones(num_bytes, dtype=torch.uint8)]


def test_amount_covers_whole_process() -> None:
    room = resolve_memory_budget("2GiB", CPU, ())
    others_bytes = 2**31 - room.usable_bytes * 100 / 95
    assert (room.limit_bytes, room.requested) == (2**31, "2GiB")
    assert others_bytes == pytest.approx(resident(), rel=0.05)


def test_resident_tensors_are_not_counted_as_others() -> None:
    held = tensors(200 * MIB)
    without, with_held = resolve_memory_budget("4GiB", CPU, ()), resolve_memory_budget("4GiB", CPU, held)
    assert with_held.limit_bytes == without.limit_bytes
    assert with_held.usable_bytes - without.usable_bytes == pytest.approx(0.95 * 200 * MIB, rel=0.05)


def test_resident_tensors_count_once_per_device() -> None:
    held = tensors(200 * MIB)
    elsewhere = torch.empty(2**33, device="meta")
    once = resolve_memory_budget("4GiB", CPU, held)
    assert resolve_memory_budget("4GiB", CPU, [*held, *held, held[0][5:], elsewhere]).usable_bytes == pytest.approx(
        once.usable_bytes, rel=0.01
    )


def test_resident_tensors_may_be_sparse_or_uninitialized() -> None:
    lazy = nn.LazyLinear(3)
    assert resolve_memory_budget("4GiB", CPU, [*lazy.parameters(), torch.eye(4).to_sparse()]).usable_bytes > 0


def test_resident_tensors_above_process_leave_others_zero() -> None:
    untouched = torch.empty(2**31, dtype=torch.uint8)  # the kernel has not given this memory
    room = resolve_memory_budget("1GiB", CPU, [untouched])
    assert room == MemoryBudget.from_limit(2**30, "1GiB")


@pytest.mark.parametrize("memory", ["1MiB", 2000, "0.001%"])
def test_amount_below_process_use_leaves_nothing(memory: str | int) -> None:
    room = resolve_memory_budget(memory, CPU, ())
    assert room.usable_bytes == 0
    assert 0 < room.limit_bytes < resident()


def test_share_refers_to_total_memory() -> None:
    total = usage._host_memory()[1]
    assert resolve_memory_budget("50%", CPU, ()).limit_bytes == total // 2
    assert resolve_memory_budget("100%", CPU, ()).limit_bytes == total


@pytest.mark.parametrize("memory", [2**31, "2GiB", "2147483648B", parse_memory("2 GiB")])
def test_amount_has_several_spellings(memory: Any) -> None:
    room = resolve_memory_budget(memory, CPU, ())
    assert room.limit_bytes == 2**31
    assert room.requested in {"2GiB", "2147483648B", "2 GiB"}


def test_default_limit_is_free_memory_minus_margin() -> None:
    room = resolve_memory_budget(None, CPU, ())
    free, total = usage._host_memory()
    assert room.requested is None
    assert room.usable_bytes == room.limit_bytes * 95 // 100, "what others take is not free"
    assert room.limit_bytes == pytest.approx(free - max(total // 50, 256 * MIB), abs=total // 4)  # others run meanwhile
    assert 0 <= room.limit_bytes < total


def test_amount_above_total_is_one_sentence() -> None:
    total = usage._host_memory()[1]
    most = f"{total * 100 // 2**30 // 100}.{total * 100 // 2**30 % 100:02}GiB"
    with pytest.raises(ValueError, match="memory") as raised:
        resolve_memory_budget("1000TiB", CPU, ())
    assert str(raised.value) == (
        f"memory 1000TiB is more than the {most} that the device has: pass {most} or less, or a share such as 90%."
    )


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("many", "memory is 'many': it must be an amount such as 24GiB or a share such as 80%."),
        ("", "memory is '': it must be an amount such as 24GiB or a share such as 80%."),
        (24, "memory is 24: a number without a unit is in bytes; pass text with a unit, such as '24GiB'."),
        ("120%", "memory is '120%': a share must be at most 100%, such as 80%."),
        (-1, "memory is -1: it must be more than 0, such as 24GiB or 80%."),
        (2.5, "memory is 2.5: it must be an amount such as 24GiB or a share such as 80%."),
    ],
)
def test_invalid_amount_is_one_sentence(memory: Any, message: str) -> None:
    with pytest.raises(ValueError, match="memory") as raised:
        resolve_memory_budget(memory, CPU, ())
    assert str(raised.value) == message


# machine and containers -------------------------------------------------------------------------------------------


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text))
    return root


def meminfo(available_kib: object) -> str:
    return f"MemTotal:       99999999 kB\nMemFree:        1 kB\nMemAvailable:   {available_kib} kB\nBuffers: 5 kB\n"


def test_free_memory_is_what_kernel_calls_available(tmp_path: Path) -> None:
    proc = write(tmp_path, {"meminfo": meminfo(4096)})
    assert usage._host_memory(proc, NOWHERE) == (4 * MIB, TOTAL)


@pytest.mark.parametrize("text", [None, "", "MemTotal: 5 kB\n", "MemAvailable:\n", "MemAvailable: lots kB\n", "\udcff"])
def test_half_of_total_is_free_without_kernel_data(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "meminfo").write_bytes(text.encode(errors="surrogateescape"))
    assert usage._host_memory(tmp_path, NOWHERE) == (TOTAL // 2, TOTAL)


def host(root: Path, files: dict[str, object], group: str | None = "0::/\n") -> tuple[int, int]:
    """Free and total, in MiB, of a machine with 64 MiB available."""
    proc = write(root / "proc", {"meminfo": meminfo(64 * 1024)} | ({} if group is None else {"self/cgroup": group}))
    free, total = usage._host_memory(proc, write(root / "cgroup", files))
    assert free % MIB == 0
    return free // MIB, (total // MIB if total != TOTAL else -1)


def version_2(most: object, current: object, stat: str | None = None, *, at: str = "") -> dict[str, object]:
    more = {} if stat is None else {f"{at}memory.stat": stat}
    return {f"{at}memory.max": most, f"{at}memory.current": current} | more


def version_1(most: object, used: object, stat: str | None = None, *, at: str = "") -> dict[str, object]:
    more = {} if stat is None else {f"memory/{at}memory.stat": stat}
    return {f"memory/{at}memory.limit_in_bytes": most, f"memory/{at}memory.usage_in_bytes": used} | more


def test_container_limits_free_and_total_memory(tmp_path: Path) -> None:
    assert host(tmp_path, version_2(f"{48 * MIB}\n", f"{8 * MIB}\n")) == (40, 48)


def test_container_above_free_memory_limits_nothing(tmp_path: Path) -> None:
    assert host(tmp_path, version_2(2**62, 8 * MIB)) == (64, -1)


@pytest.mark.parametrize(
    "files",
    [
        version_2("max\n", 8 * MIB),
        version_2("", 8 * MIB),
        version_2(8 * MIB, "much"),
        {"memory.max": 48 * MIB},
        {"memory.current": 8 * MIB},
        {},
    ],
)
def test_container_without_known_limit_limits_nothing(tmp_path: Path, files: dict[str, object]) -> None:
    assert host(tmp_path, files) == (64, -1)


def test_container_over_its_limit_has_nothing_free(tmp_path: Path) -> None:
    assert host(tmp_path, version_2(8 * MIB, 9 * MIB)) == (0, 8)


def test_cached_files_in_container_count_as_free(tmp_path: Path) -> None:
    stat = f"anon {5 * MIB}\nfile {30 * MIB}\nshmem 0\ninactive_file {20 * MIB}\nactive_file {10 * MIB}\n"
    assert host(tmp_path, version_2(48 * MIB, 40 * MIB, stat)) == (48 - 10, 48)


@pytest.mark.parametrize("stat", ["", "inactive_file\n", "inactive_file many\n", "a b c\n"])
def test_unreadable_statistics_free_nothing(tmp_path: Path, stat: str) -> None:
    assert host(tmp_path, version_2(48 * MIB, 40 * MIB, stat)) == (8, 48)


def test_files_do_not_make_use_negative(tmp_path: Path) -> None:
    assert host(tmp_path, version_2(48 * MIB, 4 * MIB, f"inactive_file {5 * MIB}\n")) == (48, 48)


@pytest.mark.parametrize("group", ["0::/batch/job_7/step\n", "1:name=systemd:/\n0::/batch/job_7/step\n"])
def test_tightest_of_nested_groups_counts(tmp_path: Path, group: str) -> None:
    files = version_2(50 * MIB, 40 * MIB, at="batch/") | version_2("max", 1, at="batch/job_7/step/")
    assert host(tmp_path, files | version_2(48 * MIB, 8 * MIB, at="batch/job_7/"), group) == (10, 48)


def test_other_groups_limit_nothing(tmp_path: Path) -> None:
    assert host(tmp_path, version_2(8 * MIB, 0, at="other/"), "0::/mine\n") == (64, -1)


@pytest.mark.parametrize("group", [None, "", "nonsense\n", "4:memory\n", "0::/not/there:even\n"])
def test_unknown_group_uses_root_limit(tmp_path: Path, group: str | None) -> None:
    assert host(tmp_path, version_2(48 * MIB, 8 * MIB), group) == (40, 48)


def test_version_one_groups_are_supported(tmp_path: Path) -> None:
    group = "9:name=systemd:/\n5:devices:/elsewhere\n4:memory:/docker/abc\n1:cpu:/\n"
    stat = f"inactive_file 0\ntotal_inactive_file {2 * MIB}\ntotal_active_file {1 * MIB}\n"
    inside = version_1(48 * MIB, 11 * MIB, stat, at="docker/abc/")
    assert host(tmp_path / "on the machine", inside | version_1(2**63 - 4096, 90 * MIB), group) == (40, 48)
    assert host(tmp_path / "in the container", version_1(48 * MIB, 8 * MIB), group) == (40, 48)


def test_process_memory_is_read_in_pages(tmp_path: Path) -> None:
    proc = write(tmp_path, {"self/statm": "99999 1234 77 1 0 500 0\n"})
    assert usage._resident_bytes(proc) == 1234 * PAGE


@pytest.mark.parametrize("text", [None, "", "7", "many pages"])
def test_peak_process_memory_is_the_fallback(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        write(tmp_path, {"self/statm": text})
    assert usage._resident_bytes(tmp_path) == peak_bytes(CPU)


def test_process_memory_grows_with_allocations() -> None:
    before = resident()
    held = tensors(300 * MIB)
    assert resident() - before == pytest.approx(held[0].nbytes, rel=0.1)


# out of memory ----------------------------------------------------------------------------------------------------


def allocate_too_much() -> torch.Tensor:
    return torch.empty(2**60, dtype=torch.uint8)


def caught() -> RuntimeError:
    with pytest.raises(RuntimeError) as raised:
        allocate_too_much()
    return raised.value


FAILED_ALLOCATIONS = {
    "cuda": "CUDA out of memory. Tried to allocate 20.00 MiB.",
    "cuda runtime": "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "hip": "HIP out of memory. Tried to allocate 2.00 GiB.",
    "xpu": "XPU out of memory. Tried to allocate 2.00 GiB.",
    "mps": "MPS backend out of memory (MPS allocated: 9.00 GB)",
    "triton": "Triton Error [CUDA]: out of memory",
    "xla": "RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.",
    "cublas": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cudnn": "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cudnn 9": "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cudnn workspace": "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a ...",
    "cusolver": "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "cufft": "cuFFT error: CUFFT_ALLOC_FAILED",
    "hpu": "FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::8",
    "cpu": "[enforce fail] DefaultCPUAllocator: can't allocate memory",
    "windows": "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
    "c++": "std::bad_alloc",
}
QUOTED = "the state of AdamW does not fit in memory (DefaultCPUAllocator: can't allocate memory: you tried …)"
OTHERS = {
    "quoted": bigbatch.MemoryLimitError(QUOTED),
    "other rank": bigbatch.RankFailedError("rank 1 failed: OutOfMemoryError: CUDA out of memory."),
    "shapes": RuntimeError("shapes do not match"),
    "shared memory": RuntimeError("Your dataloader's workers are out of shared memory."),
    "resources": RuntimeError("out of resource: shared memory, Required: 9, Hardware limit: 8"),
    "assertion": RuntimeError("CUDA error: device-side assert triggered"),
    "handle": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    "value": ValueError("can't allocate memory"),
    "interrupt": KeyboardInterrupt("out of memory"),
}


@pytest.mark.parametrize("name", FAILED_ALLOCATIONS)
def test_sentences_of_failed_allocations_are_recognized(name: str) -> None:
    assert is_out_of_memory(RuntimeError(FAILED_ALLOCATIONS[name]))
    assert is_out_of_memory(torch.OutOfMemoryError(FAILED_ALLOCATIONS[name]))


def test_failed_allocation_of_torch_is_recognized() -> None:
    assert is_out_of_memory(caught())
    assert is_out_of_memory(torch.OutOfMemoryError())


@pytest.mark.parametrize("name", OTHERS)
def test_other_errors_are_no_failed_allocations(name: str) -> None:
    assert not is_out_of_memory(OTHERS[name])


@pytest.mark.parametrize("name", ["cuda", "cublas", "cpu"])
def test_window_recovers_from_every_sentence(name: str) -> None:
    def loss_fn(model: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, int]:
        if len(inputs) > 2:
            raise RuntimeError(FAILED_ALLOCATIONS[name])
        return model(inputs).square().sum(), len(inputs)

    torch.manual_seed(0)
    model, inputs = nn.Linear(3, 1).double(), torch.randn(7, 3).double()
    engine = bigbatch.Engine(model, None, loss_fn, microbatch=4, check=False)
    report = engine.backward(inputs)
    (expected,) = torch.autograd.grad(model(inputs).square().sum() / 7, [model.weight])
    assert report.retries > 0
    assert model.weight.grad is not None
    assert torch.allclose(model.weight.grad, expected, rtol=1e-12, atol=0)


def huge() -> nn.Module:
    """A parameter that fits, since nothing of it is there, and whose optimizer's state never does."""
    model = nn.Linear(1, 1, bias=False)
    model.weight = nn.Parameter(torch.zeros(1, 1).expand(2**29, 2**29), requires_grad=True)
    return model


def test_oversized_state_raises_final_memory_error() -> None:
    model = huge()
    accumulator = bigbatch.Accumulator(model, torch.optim.RMSprop(model.parameters(), momentum=0.9))
    with pytest.raises(bigbatch.MemoryLimitError, match="can't allocate memory") as raised:
        accumulator.prepare()
    assert not is_out_of_memory(raised.value)


def last_word(calls: list[int]) -> Any:
    def loss_fn(model: nn.Module, inputs: torch.Tensor) -> Any:
        calls.append(len(inputs))
        raise bigbatch.MemoryLimitError("no sample fits (DefaultCPUAllocator: can't allocate memory)")

    return loss_fn


def test_window_does_not_split_after_final_error() -> None:
    model, calls = nn.Linear(2, 1), []
    engine = bigbatch.Engine(model, torch.optim.SGD(model.parameters()), last_word(calls), microbatch=8, check=False)
    with pytest.raises(bigbatch.MemoryLimitError, match=r"^no sample fits"):
        engine.step(torch.ones(8, 2))
    assert calls == [8]


def test_verify_does_not_retry_after_final_error() -> None:
    calls: list[int] = []
    with pytest.raises(bigbatch.MemoryLimitError, match=r"^no sample fits"):
        bigbatch.verify(nn.Linear(2, 1), last_word(calls), torch.ones(8, 2))
    assert calls == [8]


def test_update_passes_final_error_through() -> None:
    class Final(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise bigbatch.MemoryLimitError("no state fits (can't allocate memory)")

    model = nn.Linear(2, 1)
    engine = bigbatch.Engine(model, Final(model.parameters()), lambda m, x: (m(x).sum(), len(x)), microbatch=8)
    with pytest.raises(bigbatch.MemoryLimitError, match=r"^no state fits \(can't allocate memory\)$"):
        engine.step(torch.ones(8, 2))


def test_process_already_above_limit_is_reported() -> None:
    room = MemoryBudget.from_limit(2**20, "1MiB", reserved_bytes=2**30)
    assert room.usable_bytes == 0
    assert str(room) == "memory is limited to 1MiB, all of which this process uses outside of tensors"


def test_peak_restarts_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    restarted: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", restarted.append)
    for device in (CPU, torch.device("cuda", 1), torch.device("mps")):
        restart_peak(device)
    assert restarted == [torch.device("cuda", 1)]
