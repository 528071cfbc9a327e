"""Atomic writes and renames, files that are opened only if they are regular, and the reason of an OSError."""

import os
from pathlib import Path
from typing import Literal

import pytest

from bigbatch.errors import os_reason
from bigbatch.lm.files import open_regular, parse_json, read_regular, replace_folder, write_atomically
from support.checkpoints import mounted


def test_write_replaces_content_without_partial_file(tmp_path: Path) -> None:
    for data in (b"first", b"second"):
        write_atomically(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_failed_write_keeps_the_previous_content(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=8k") as disk:
        write_atomically(disk / "file", b"first")
        with pytest.raises(OSError, match="No space left"):
            write_atomically(disk / "file", bytes(2**16))
        assert [path.name for path in disk.iterdir()] == ["file"]
        assert (disk / "file").read_bytes() == b"first"


@pytest.mark.parametrize("exists", [False, True])
def test_replaced_folder_has_the_new_files_only(exists: bool, tmp_path: Path) -> None:
    partial, target, old = (tmp_path / name for name in ("new.partial", "new", "new.older"))
    partial.mkdir()
    (partial / "b").touch()
    if exists:
        target.mkdir()
        (target / "a").touch()
    replace_folder(partial, target, old=old)
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "b"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "no space left on device"),
        (OSError("Two lines.\nof text"), "two lines"),
        (OSError(), "OSError"),
    ],
)
def test_reason_is_the_end_of_a_sentence(error: OSError, reason: str) -> None:
    assert os_reason(error) == reason


@pytest.mark.parametrize("mode", ["rb", "ab", "a+b"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("link", "it is a link, which is not followed"),
        ("dangling link", "it is a link, which is not followed"),
        ("pipe", "it is not a regular file"),
        ("folder", "Is a directory"),
    ],
)
def test_other_kinds_of_files_are_not_opened(
    tmp_path: Path, kind: str, reason: str, mode: Literal["rb", "ab", "a+b"]
) -> None:
    path, target = tmp_path / "file", tmp_path / "target"
    if kind == "link":
        target.write_text("text", encoding="utf-8")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(target)
    with pytest.raises(OSError, match=reason):
        open_regular(path, mode)
    assert target.exists() == (kind == "link")


def test_hard_link_is_replaced_before_it_is_changed(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1\n")
    os.link(tmp_path / "one", tmp_path / "other")
    with open_regular(tmp_path / "one", "ab") as file:
        file.write(b"2\n")
    assert (tmp_path / "one").read_bytes() == b"1\n2\n"
    assert (tmp_path / "other").read_bytes() == b"1\n"


def test_partial_file_that_is_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / f"file.{os.getpid()}.partial").symlink_to(tmp_path / "target")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "target").read_bytes() == b"precious"
    assert (tmp_path / "file").read_bytes() == b"new"


def test_large_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.truncate(tmp_path / "file", 2**40)
    with pytest.raises(OSError, match=r"it has 1,099,511,627,776 bytes, and at most 67,108,864 are read"):
        read_regular(tmp_path / "file")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "a key occurs twice in one object"),
        (b"\xff", "can't decode byte"),
        (b"9" * 5000, "Exceeds the limit"),
        (b"", "Expecting value"),
    ],
)
def test_invalid_json_is_a_value_error(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(data)
