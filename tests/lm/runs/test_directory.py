"""The run directory: one run per folder, flushed lines, valid JSON."""

import json
import os
from pathlib import Path

import pytest

from bigbatch.errors import InputError
from bigbatch.lm.runs.directory import RunDirectory, check_free, default_path


def test_each_line_is_flushed_and_holds_no_nan(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "a" / "run", {"seed": 1}) as run:
        run.write_metrics({"step": 1, "loss": float("nan"), "skipped": "no items"})
        lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8")
        assert json.loads(lines) == {"step": 1, "loss": None, "skipped": "no items"}
    assert json.loads((run.path / "config.json").read_text(encoding="utf-8")) == {"seed": 1}


def test_folder_with_content_is_refused_and_unchanged(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run", {})
    with pytest.raises(
        InputError,
        match=r"run holds another run: name a new or empty folder, or continue it: bigbatch",
    ):
        RunDirectory.create(tmp_path / "run", {"other": 1})
    assert (tmp_path / "run" / "config.json").read_text(encoding="utf-8") == "{}\n"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    with pytest.raises(InputError, match="notes holds other files"):
        RunDirectory.create(tmp_path / "notes", {})
    with pytest.raises(InputError, match=r"a\.txt is a file"):
        RunDirectory.create(tmp_path / "notes" / "a.txt", {})


def test_unwritable_path_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^--out .*file/run cannot be written: .*\.$"):
        RunDirectory.create(tmp_path / "file" / "run", {})


def test_default_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_path("tiny", ["python-stdlib"]) == Path("runs/tiny-python-stdlib")
    Path("runs/tiny-python-stdlib").mkdir(parents=True)
    Path("runs/tiny-python-stdlib-2").mkdir(parents=True)
    assert default_path("tiny", ["python-stdlib"]) == Path("runs/tiny-python-stdlib-3")
    assert default_path("/models/Qwen2/", ["/data/chat.jsonl"]) == Path("runs/Qwen2-chat")
    assert default_path("tiny", ["s3://bucket/train-{000..099}.tar"]) == Path("runs/tiny-train")
    assert default_path("tiny", ["a/logs.csv.gz", "b", "c"]) == Path("runs/tiny-logs-and-2-more")
    assert default_path("tiny", ["/a/logs/*.txt"]) == Path("runs/tiny-logs")
    assert default_path("tiny", ["/a/part-*.json"]) == Path("runs/tiny-part")


def test_failed_create_removes_the_folders_it_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written: file name too long\.$"):
        RunDirectory.create(tmp_path / "a" / "b" / ("c" * 300), {})
    assert list(tmp_path.iterdir()) == []


def test_path_below_a_file_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^--out .*file/a/b cannot be written: .*/file is a file\.$"):
        check_free(tmp_path / "file" / "a" / "b")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where no folder can be created")
@pytest.mark.parametrize("path", ["/proc/run", "/proc/a/run"])
def test_file_system_without_new_folders_is_refused_first(path: str) -> None:
    reason = "no such file or directory" if os.geteuid() == 0 else "/proc is not writable"
    with pytest.raises(InputError) as refusal:
        check_free(Path(path))
    assert str(refusal.value) == f"--out {path} cannot be written: {reason}."


def test_check_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / "empty")
    check_free(tmp_path / "a" / "run")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(InputError, match="locked is not writable"):
        check_free(tmp_path / "locked" / "run")
