"""The lock of a run directory: one holder, an error that names it, nothing stale after a kill."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from bigbatch.errors import InputError
from bigbatch.lm.runs import lock
from bigbatch.lm.runs.lock import RunLock
from support.checkpoints import mounted

HOLD = """
import sys
from pathlib import Path
from bigbatch.lm.runs.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path, code: str = HOLD) -> Iterator[subprocess.Popen[str]]:
    """Start another process that holds the lock."""
    words = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught, RunLock(folder):
        pass
    return str(caught.value)


def test_error_of_second_process_names_the_holder(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        host = re.escape(os.uname().nodename)
        assert re.fullmatch(
            rf"{re.escape(str(tmp_path))} is in use by process {process.pid} on {host} since "
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC: wait for it, or stop it\.",
            refusal(tmp_path),
        )


def test_lock_is_free_after_holder_is_killed(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with RunLock(tmp_path) as held:
            assert held.is_exclusive
            assert json.loads((tmp_path / ".lock").read_text(encoding="utf-8"))["pid"] == os.getpid()


def test_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    forking = HOLD.replace("    print(", "    import os\n    child = os.fork()\n    print(").replace(
        'print("held", flush=True)', 'os.write(1, f"held {child}\\n".encode())'
    )
    words = [sys.executable, "-c", forking, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = max(int(process.stdout.readline().split()[1]) for _ in range(2))  # the child prints 0
        process.kill()
        process.wait()
        os.kill(child, 0)  # it is alive
        with RunLock(tmp_path) as held:
            assert held.is_exclusive
        os.kill(child, signal.SIGKILL)


def test_second_lock_in_same_process_is_rejected(tmp_path: Path) -> None:
    with RunLock(tmp_path), ThreadPoolExecutor(1) as pool:
        assert f"is in use by process {os.getpid()} on " in refusal(tmp_path)
        assert f"is in use by process {os.getpid()} on " in pool.submit(refusal, tmp_path).result()


def test_lock_is_free_after_an_exception(tmp_path: Path) -> None:
    run_lock = RunLock(tmp_path)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), run_lock:
            assert 1 / (1 - run_lock.is_exclusive)
        assert not run_lock.is_exclusive
        assert (tmp_path / ".lock").read_bytes() == b""


def test_subprocesses_do_not_inherit_the_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path) as held:
        assert held._descriptor is not None
        assert not os.get_inheritable(held._descriptor)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"pid": 1}', '{"pid": "x", "host": "", "since": ""}', "[" * 9999, "\0" * 99]
)
def test_unreadable_holder_is_another_process(content: str, tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / ".lock").write_text(content, encoding="utf-8")
        assert refusal(tmp_path) == f"{tmp_path} is in use by another process: wait for it, or stop it."


def test_control_characters_of_holder_are_not_printed(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        content = {"pid": 1, "host": "\x1b[2J", "since": "now"}
        (tmp_path / ".lock").write_text(json.dumps(content), encoding="utf-8")
        assert "in use by another process" in refusal(tmp_path)


def test_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no") == f"there is no folder {tmp_path / 'no'}."
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file") == f"{tmp_path / 'file'} cannot be written: not a directory."


def test_symbolic_link_as_lock_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text", encoding="utf-8")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    assert " cannot be written: " in refusal(tmp_path)
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "text"


def test_other_kinds_of_lock_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    assert refusal(tmp_path) == f"{tmp_path} cannot be written: .lock: it is not a regular file."
    (tmp_path / ".lock").unlink()
    (tmp_path / "precious").write_text("text", encoding="utf-8")
    os.link(tmp_path / "precious", tmp_path / ".lock")
    assert refusal(tmp_path) == f"{tmp_path} cannot be written: .lock has another hard link."
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "text"


def test_read_only_folder_is_one_sentence(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro,size=64k") as disk:
        assert refusal(disk) == f"{disk} cannot be written: read-only file system."


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_write_access_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert refusal(tmp_path) == f"{tmp_path} cannot be written: permission denied."


def test_full_disk_is_one_sentence_without_lock(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=8k") as disk:
        (disk / ".lock").touch()
        with pytest.raises(OSError, match="No space"):
            (disk / "large").write_bytes(b"x" * 2**16)
        assert refusal(disk) == f"{disk} cannot be locked: no space left on device."
        (disk / "large").unlink()
        with RunLock(disk) as held:
            assert held.is_exclusive


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_file_system_without_locks_is_not_exclusive(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_locks(descriptor: int, *, blocking: bool) -> bool:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock, "lock_descriptor", without_locks)
    with RunLock(tmp_path) as held:
        assert not held.is_exclusive
