"""Checkpoints of several ranks when a rank fails or is killed, and when files were changed."""

import json
import os
import pickle
import shutil
from pathlib import Path
from random import Random

import pytest

from bigbatch.errors import CheckpointError
from bigbatch.lm.checkpoint import newest, read, verify
from lm.checkpoint import sharded_faults_cases
from lm.checkpoint.sharded_faults_cases import FILES, PARTS, Payload, save_all
from support.checkpoints import RUN_ID, assert_holds, names_in
from support.command_line import completed
from support.forked_processes import module
from support.gloo_processes import run
from support.tiers import slow

TESTS = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with step-1 and step-2 of two ranks, to be copied."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    assert run(save_all, 2, folder, 1, 2) == [[folder / "step-1", folder / "step-2"]] * 2
    return folder


@pytest.fixture
def folder(two: Path, tmp_path: Path) -> Path:
    return shutil.copytree(two, tmp_path / "checkpoints")


def test_one_process_reads_checkpoint_of_two_ranks(two: Path) -> None:
    assert_holds(two / "step-1", 1)
    assert_holds(two / "step-2", 2)
    assert names_in(two / "step-2") == set(FILES)


def test_every_dtype_and_sharding_loads_bit_identically(tmp_path: Path) -> None:
    run(sharded_faults_cases.every_kind, 2, tmp_path)


def test_torch_reader_reads_files(tmp_path: Path) -> None:
    assert run(sharded_faults_cases.read_by_the_reader_of_dcp, 2, tmp_path) == [True, True]


# one fails -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [slow(0), 1])
def test_no_space_on_one_rank_keeps_last_good(failing: int, tmp_path: Path) -> None:
    first, second = run(sharded_faults_cases.no_space_at_every_point, 2, tmp_path, failing, timeout_s=120)
    points, survived = first
    assert first == second
    assert len(points) > (25 if failing == 0 else 10)
    synced = [point.removeprefix("fsync ") for point in points if point.startswith("fsync ")]
    own = [file for file in PARTS if f"rank-{failing}" in file]
    if failing == 0:
        assert synced == [*own, "state.json", "order.json", "manifest.json", "step-2.partial", "checkpoints", "run"]
        assert points.index("fsync step-2.partial") < points.index("rename step-2.partial")
        assert points.index("rename step-2.partial") < points.index("fsync checkpoints")
    else:
        assert synced == own
    assert survived == (["mkdir checkpoints"] if failing == 0 else [])  # which is there


def test_file_size_limit_on_one_rank_fails_all(tmp_path: Path) -> None:
    why = "rank 1: file too large; the last valid one is step-1."
    said = ("CheckpointError", f"checkpoint step-2 could not be written to {tmp_path}: {why}")
    assert (
        run(sharded_faults_cases.file_too_large, 2, tmp_path, 1) == [[said, ["step-1"], (tmp_path / "step-1", [])]] * 2
    )


def test_non_disk_error_is_raised_and_shared(tmp_path: Path) -> None:
    first, second = run(sharded_faults_cases.raise_on_one, 2, tmp_path, 1)
    assert [kind for kind, _ in second] == ["MemoryError", "KeyboardInterrupt", "SystemExit", "OutOfMemoryError"]
    assert {kind for kind, _ in first} == {"CheckpointError"}
    assert first[0][1].endswith("rank 1: MemoryError: 32 GiB; the last valid one is step-1.")


def test_unstorable_content_is_rejected_on_all_ranks(tmp_path: Path) -> None:
    first, second = run(sharded_faults_cases.refuse, 2, tmp_path / "new")
    assert first == second
    expected = [
        ("TypeError", "model: x is a list and not a plain tensor"),
        ("ValueError", "model: x is a partial sum over ranks: redistribute it first."),
        ("ValueError", "x is in two parts, of which one is optimizer: give each tensor one name."),
        ("ValueError", "the shards of the ranks do not make whole tensors: "),
        ("ValueError", "a part of a checkpoint cannot be called 'manifest/-rank-0-of-2'"),
        ("TypeError", "state is a tuple, which JSON cannot store"),
        ("ValueError", "run_id='' names no run"),
        ("ValueError", "step=-1 cannot be the number of updates done"),
    ]
    for (kind, said), (expected_kind, words) in zip(first, expected, strict=True):
        assert kind == expected_kind
        assert said.startswith(words)


def test_existing_checkpoint_is_kept_or_rejected_by_run(tmp_path: Path) -> None:
    first, second = run(sharded_faults_cases.refuse_another_run, 2, tmp_path)
    assert first == second
    assert first[0] == "CheckpointError"
    assert f"step-1 already exists and belongs to run other, not to run {RUN_ID}" in first[1]


def test_ranks_on_different_disks_are_detected(two: Path, tmp_path: Path) -> None:
    seen = "model-rank-1-of-2.safetensors cannot be seen by the first rank: all ranks need one file system"
    for (wrote, written), (read_kind, was_read) in run(sharded_faults_cases.separate_disks, 2, two, tmp_path):
        assert wrote == read_kind == "CheckpointError"
        assert written.endswith(f"rank 0: {seen}; the last valid one is step-2.")
        assert was_read.endswith("step-2 cannot be used: manifest.json is not the same on all ranks.")
    assert names_in(tmp_path / "0") == {"step-1", "step-2"}


# one dies --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(two: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[tuple[str, str, Path]]]:
    """For each rank the places where it was killed in a write, what the other said, and what they left."""
    root = tmp_path_factory.mktemp("killed")
    found: dict[int, list[tuple[str, str, Path]]] = {}
    for rank in (0, 1):
        template = root / str(rank) / "template"
        shutil.copytree(two / "step-1", template / "step-1")
        script = "lm.checkpoint.sharded_crash_script", str(template), str(rank)
        done = completed(module, *script, folder=root, timeout_s=400)
        assert done.returncode == 0, done.stderr
        found[rank] = [(point, said, Path(left)) for point, said, left in map(json.loads, done.stdout.splitlines())]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_killed_during_write_leaves_old_or_new(rank: int, killed: dict[int, list[tuple[str, str, Path]]]) -> None:
    points = [point for point, _, _ in killed[rank]]
    assert {f"open {file}" for file in PARTS if f"rank-{rank}" in file} <= set(points)
    assert {"write ", "after fsync"} <= set(points)
    renamed = points.index("rename step-2.partial") if rank == 0 else len(points)
    for number, (point, said, folder) in enumerate(killed[rank]):
        step = 1 if number <= renamed else 2
        assert newest(folder / "left") == (folder / "left" / f"step-{step}", []), point
        assert_holds(folder / "left" / f"step-{step}", step)
        assert said.startswith("CheckpointError: checkpoint step-2 could not be written to "), point
        assert said.endswith(": another rank cannot be reached; the last valid one is step-1."), point
        if number % 3 == 0:
            assert newest(folder / "next") == (folder / "next" / "step-2", []), point
            assert names_in(folder / "next") == {"step-1", "step-2"}, point
            assert_holds(folder / "next" / "step-2", 2)


# something was changed -------------------------------------------------------------------------------------------


def flip(path: Path, file: str, random: Random) -> str:
    data = bytearray((path / file).read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    (path / file).write_bytes(data)
    return file


def truncate(path: Path, file: str, random: Random) -> str:
    os.truncate(path / file, random.randrange((path / file).stat().st_size))
    return file


def miss(path: Path, file: str, random: Random) -> str:
    (path / file).unlink()
    return file


def swap_ranks(path: Path, file: str, random: Random) -> str:
    part = random.choice(["model", "optimizer"])
    first, second = (path / f"{part}-rank-{rank}-of-2.safetensors" for rank in (0, 1))
    kept = first.read_bytes()
    second.replace(first)
    second.write_bytes(kept)
    return f"{part}-rank-"


def take_the_older(path: Path, file: str, random: Random) -> str:
    shutil.copyfile(path.with_name("step-1") / file, path / file)
    return file


def add(path: Path, file: str, random: Random) -> str:
    name = random.choice([".metadata", "model-rank-2-of-3.safetensors", "model.safetensors"])
    shutil.copyfile(path / file, path / name)
    return name


FAULTS = [flip, truncate, miss, swap_ranks, take_the_older, add]


def test_every_fault_is_named_on_any_rank_count(two: Path, tmp_path: Path) -> None:
    reasons: dict[Path, str] = {}
    swapped: dict[Path, str] = {}
    for seed in range(len(FAULTS) * len(FILES)):
        random = Random(seed)
        fault, file = FAULTS[seed % len(FAULTS)], FILES[seed // len(FAULTS)]
        folder = shutil.copytree(two, tmp_path / str(seed))
        path = folder / "step-2"
        named = fault(path, file, random)
        reason = verify(path)
        assert reason is not None
        assert reason.startswith(named), (fault.__name__, reason)
        assert newest(folder) == (folder / "step-1", [(path, reason)])
        with pytest.raises(CheckpointError) as error_of:
            read(path)
        assert str(error_of.value) == f"checkpoint {path} cannot be used: {reason}."
        reasons[path] = reason
        if fault is swap_ranks:
            swapped[path] = named
    whole = two / "step-2"
    first, second = run(sharded_faults_cases.read_each, 2, whole, *reasons, whole)
    assert first == second
    assert first[0] == first[-1] == (None,)
    for ((kind, said),), (path, reason) in zip(first[1:-1], reasons.items(), strict=True):
        assert kind == "CheckpointError"
        if path in swapped:  # two are wrong, and each rank names the one that it hashed
            assert said.startswith(f"checkpoint {path} cannot be used: {swapped[path]}")
        else:
            assert said == f"checkpoint {path} cannot be used: {reason}."


def test_tensors_of_another_model_are_rejected_unfilled(two: Path) -> None:
    first, second = run(sharded_faults_cases.refuse_to_fill, 2, two / "step-2")
    assert first == second
    assert first == [
        ("ValueError", "weight has the shape [5, 7] in checkpoint step-2, not [5, 8]."),
        ("ValueError", "bias is torch.bfloat16 in checkpoint step-2, not torch.int64."),
        ("ValueError", "checkpoint step-2 has no tensor called new: it is of another model."),
        ("ValueError", "checkpoint step-2 has no tensor called new: it is of another model."),
        ("ValueError", "the tensors to fill: weight is on the meta device and has no values."),
    ]


# nothing runs ----------------------------------------------------------------------------------------------------


def test_reading_unpickles_nothing_and_ignores_torch_metadata(folder: Path, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", folder / "step-2"
    assert run(sharded_faults_cases.unpickled, 2, path) == [(None, 0, 1)] * 2
    (path / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    said = ("CheckpointError", f"checkpoint {path} cannot be used: .metadata does not belong to it.")
    assert verify(path) == ".metadata does not belong to it"
    assert run(sharded_faults_cases.unpickled, 2, path) == [(said, 0, 1)] * 2
    assert not marker.exists()


TOGETHER = ["all_gather", "all_gather", "broadcast", "broadcast"]  # sizes and texts, one decision


def test_sharded_io_is_minimal_and_hashes_files_once(tmp_path: Path) -> None:
    first, second = run(sharded_faults_cases.counted, 2, tmp_path)
    assert first["write"] == second["write"] == TOGETHER * 2
    assert first["read"] == second["read"] == TOGETHER * 3
    assert sorted(first["hashed"] + second["hashed"]) == sorted([*PARTS, "state.json", "order.json"])
    assert (first["largest"], second["largest"]) == (3 * 7, 2 * 7)  # of 5 × 7
