"""Checkpoints when the process is killed or the disk is full: what was good stays good, and the sentence says so."""

import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from bigbatch.errors import CheckpointError
from bigbatch.lm.checkpoint import newest, prune, verify, write
from support.checkpoints import FILES, RUN_ID, DiskOperations, assert_holds, mounted, names_in, no_space, save
from support.command_line import completed
from support.forked_processes import module

TESTS = Path(__file__).parents[2]


# killed ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, Path]]]:
    """For each action the places where processes were killed in it, and what they left; the last one lived."""
    root = tmp_path_factory.mktemp("killed")
    templates = {action: root / action / "template" for action in ("write", "replace", "prune")}
    for action, template in templates.items():
        template.parent.mkdir(exist_ok=True)
        for step in {"write": [1], "replace": [1, 2], "prune": [1, 2, 3]}[action]:
            save(template, step)
    (templates["write"] / "step-2.partial").mkdir()
    (templates["write"] / "step-2.partial" / "model.safetensors").touch()
    (templates["replace"] / "step-2" / "state.json").unlink()
    done = completed(module, "lm.checkpoint.writer_crash_script", *map(str, templates.values()), folder=root)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[tuple[str, Path]]] = {action: [] for action in templates}
    for line in done.stdout.splitlines():
        folder, point = line.split(" ", 1)
        found[Path(folder).parent.name].append((point, Path(folder)))
    return found


def test_process_killed_during_write_leaves_old_or_new(
    killed: dict[str, list[tuple[str, Path]]],
) -> None:
    points = [point for point, _ in killed["write"]]
    assert {f"open {file}" for file in FILES} <= set(points)
    assert {f"fsync {file}" for file in (*FILES, "step-2.partial", "write")} <= set(points)
    assert {"write ", "after fsync", "rename step-2.partial", "unlink model.safetensors"} <= set(points)
    renamed = points.index("rename step-2.partial")
    for number, (point, folder) in enumerate(killed["write"]):
        step = 1 if number <= renamed else 2
        assert newest(folder) == (folder / f"step-{step}", []), point
        assert_holds(folder / f"step-{step}", step)
        save(folder, 2)
        assert names_in(folder) == {"step-1", "step-2"}, point
        assert_holds(folder / "step-2", 2)


def test_process_killed_during_replacement_leaves_older_or_new(
    killed: dict[str, list[tuple[str, Path]]],
) -> None:
    points = [point for point, _ in killed["replace"]]
    assert {"rename step-2", "rename step-2.partial", "unlink manifest.json"} <= set(points)
    renamed = points.index("rename step-2.partial")
    for number, (point, folder) in enumerate(killed["replace"]):
        step = 1 if number <= renamed else 2
        assert newest(folder)[0] == folder / f"step-{step}", point
        assert_holds(folder / f"step-{step}", step)
        save(folder, 2)
        assert names_in(folder) == {"step-1", "step-2"}, point


def test_process_killed_during_prune_leaves_intact_checkpoints(
    killed: dict[str, list[tuple[str, Path]]],
) -> None:
    points = [point for point, _ in killed["prune"]]
    assert {"rename step-1", "rename step-2", "rmdir step-1.deleted", "after fsync"} <= set(points)
    for point, folder in killed["prune"]:
        assert newest(folder) == (folder / "step-3", []), point
        assert all(verify(path) is None for path in folder.glob("step-?")), point
        prune(folder, keep=1, run_id=RUN_ID)
        assert names_in(folder) == {"step-3"}, point


def test_files_and_folders_are_synced_before_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        seen = DiskOperations(patch, no_space).seen
        save(tmp_path / "run" / "checkpoints", 1)
    renamed = seen.index("rename step-1.partial")
    synced = [point.removeprefix("fsync ") for point in seen[:renamed] if point.startswith("fsync ")]
    assert sorted(synced[:-1]) == sorted(FILES)
    assert synced[-2:] == ["manifest.json", "step-1.partial"]
    assert seen[renamed + 1 :] == ["fsync checkpoints", "fsync run"]


def test_pruned_folders_are_emptied_after_synced_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save(folder, step)
    with monkeypatch.context() as patch:
        seen = DiskOperations(patch, no_space).seen
        prune(folder, keep=1, run_id=RUN_ID)
    assert seen[:3] == ["rename step-1", "rename step-2", "fsync checkpoints"]
    assert not any(point.startswith(("rename", "fsync")) for point in seen[3:])


# full ------------------------------------------------------------------------------------------------------------


def test_no_space_during_write_keeps_last_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "template", 1)
    number, survived = 0, []
    while True:
        folder = shutil.copytree(tmp_path / "template", tmp_path / str(number))
        said = None
        with monkeypatch.context() as patch:
            points = DiskOperations(patch, no_space, at=number)
            try:
                save(folder, 2)
            except CheckpointError as error:
                said = str(error)
        if number >= len(points.seen):
            break
        if said is None:
            survived.append(points.seen[number])
        else:
            why = "no space left on device; the last valid one is step-1."
            assert said == f"checkpoint step-2 could not be written to {folder}: {why}"
        named = said is None or "rename step-2.partial" in points.seen[:number]
        assert names_in(folder) == ({"step-1", "step-2"} if named else {"step-1"}), points.seen[number]
        assert all(verify(path) is None for path in folder.iterdir())
        save(folder, 2)
        assert_holds(folder / "step-2", 2)
        number += 1
    assert number > 20
    assert survived == ["mkdir 0"]  # making the folder, which is there


def test_error_without_good_checkpoint_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        DiskOperations(patch, no_space, at=4)
        with pytest.raises(CheckpointError, match=r": no space left on device; no other valid one exists\.$"):
            save(tmp_path, 1)


def test_file_size_limit_is_one_sentence(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 1, 9, 100, 400, 600):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(CheckpointError) as caught:
                save(tmp_path, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert str(caught.value) == (
            f"checkpoint step-2 could not be written to {tmp_path}: file too large; the last valid one is step-1."
        )
        assert names_in(tmp_path) == {"step-1"}
    assert_holds(save(tmp_path, 2), 2)


def test_full_disk_is_one_sentence_and_cleans_up(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=128k") as disk:
        folder = disk / "checkpoints"
        save(folder, 1)
        for num_floats in (2**14, 2**16, 2**20):
            large = {"model": {"x": torch.zeros(num_floats), "y": torch.zeros(2**14)}}
            with pytest.raises(CheckpointError) as caught:
                write(folder, 2, run_id=RUN_ID, tensors=large, values={})
            assert str(caught.value) == (
                f"checkpoint step-2 could not be written to {folder}: no space left on device; "
                "the last valid one is step-1."
            )
            assert names_in(folder) == {"step-1"}
        assert_holds(save(folder, 2), 2)


def test_read_only_folder_is_one_sentence(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=128k") as disk:
        folder = disk / "checkpoints"
        save(folder, 1)
        save(folder, 2)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(
            CheckpointError, match=r"step-3 could not be written to .*: read-only file system; the last"
        ):
            save(folder, 3)
        with pytest.raises(
            CheckpointError, match=r"step-1 could not be removed from .*: read-only file system; the la"
        ):
            prune(folder, keep=1, run_id=RUN_ID)
        assert newest(folder) == (folder / "step-2", [])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_write_protected_folder_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    folder.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match=r": permission denied; the last valid one is step-1\.$"):
            save(folder, 2)
    finally:
        folder.chmod(0o700)


def test_folder_outside_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"step-1 could not be written to .*: no such file or directory; no other"
    ):
        save(tmp_path / "no-run" / "checkpoints", 1)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"step-1 could not be written to .*file: file exists; no other"):
        save(tmp_path / "file", 1)


def test_interruption_removes_partial_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(point: str) -> None:
        raise KeyboardInterrupt

    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        DiskOperations(patch, interrupt, at=5)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert names_in(tmp_path) == {"step-1"}
