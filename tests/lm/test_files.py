"""Atomic writes and renames, and the reason of an OSError."""

from pathlib import Path

import pytest

from bigbatch.errors import os_reason
from bigbatch.lm.files import replace_folder, write_atomically
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
