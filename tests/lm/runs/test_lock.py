"""The lock of a run directory: one holder, a sentence for the second, nothing stale after a kill."""

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
    """Another process that holds the lock."""
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


def test_a_second_process_is_told_who_holds_it(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        host = re.escape(os.uname().nodename)
        assert re.fullmatch(
            rf"{re.escape(str(tmp_path))} is in use by process {process.pid} on {host} since "
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC: wait for it, or stop it\.",
            refusal(tmp_path),
        )


def test_the_kernel_frees_it_when_the_holder_is_killed(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with RunLock(tmp_path) as lock:
            assert lock.is_exclusive
            assert json.loads((tmp_path / ".lock").read_text(encoding="utf-8"))["pid"] == os.getpid()


def test_a_child_that_outlives_its_killed_parent_does_not_hold_it(tmp_path: Path) -> None:
    forking = HOLD.replace("    print(", "    import os\n    child = os.fork()\n    print(").replace(
        'print("held", flush=True)', 'os.write(1, f"held {child}\\n".encode())'
    )
    words = [sys.executable, "-c", forking, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = max(int(process.stdout.readline().split()[1]) for _ in range(2))  # it runs as well, and says 0
        process.kill()
        process.wait()
        os.kill(child, 0)  # it lives
        with RunLock(tmp_path) as lock:
            assert lock.is_exclusive
        os.kill(child, signal.SIGKILL)


def test_a_second_one_in_the_same_process_or_thread_is_refused(tmp_path: Path) -> None:
    with RunLock(tmp_path), ThreadPoolExecutor(1) as pool:
        assert f"is in use by process {os.getpid()} on " in refusal(tmp_path)
        assert f"is in use by process {os.getpid()} on " in pool.submit(refusal, tmp_path).result()


def test_it_is_free_after_the_context_whatever_happened_in_it(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), lock:
            assert 1 / (1 - lock.is_exclusive)
        assert not lock.is_exclusive
        assert (tmp_path / ".lock").read_bytes() == b""


def test_it_does_not_go_to_programs_that_are_started(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        assert lock._descriptor is not None
        assert not os.get_inheritable(lock._descriptor)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"pid": 1}', '{"pid": "x", "host": "", "since": ""}', "[" * 9999, "\0" * 99]
)
def test_a_holder_that_cannot_be_read_is_another_process(content: str, tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / ".lock").write_text(content, encoding="utf-8")
        assert refusal(tmp_path) == f"{tmp_path} is in use by another process: wait for it, or stop it."


def test_a_holder_cannot_write_to_the_terminal_of_the_second(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        content = {"pid": 1, "host": "\x1b[2J", "since": "now"}
        (tmp_path / ".lock").write_text(json.dumps(content), encoding="utf-8")
        assert "in use by another process" in refusal(tmp_path)


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no") == f"there is no folder {tmp_path / 'no'}."
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file") == f"{tmp_path / 'file'} cannot be written: not a directory."


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text", encoding="utf-8")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    assert " cannot be written: " in refusal(tmp_path)
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "text"


def test_a_read_only_folder_is_one_sentence(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro,size=64k") as disk:
        assert refusal(disk) == f"{disk} cannot be written: read-only file system."


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert refusal(tmp_path) == f"{tmp_path} cannot be written: permission denied."


def test_a_full_disk_is_one_sentence_and_holds_nothing(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=8k") as disk:
        (disk / ".lock").touch()
        with pytest.raises(OSError, match="No space"):
            (disk / "large").write_bytes(b"x" * 2**16)
        assert refusal(disk) == f"{disk} cannot be locked: no space left on device."
        (disk / "large").unlink()
        with RunLock(disk) as lock:
            assert lock.is_exclusive


@pytest.mark.parametrize("missing", ["the module", "the file system"])
def test_where_there_are_no_such_locks_the_run_goes_on_without(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from bigbatch.lm.runs import lock as module

    class Without:
        LOCK_EX = LOCK_NB = 0

        @staticmethod
        def flock(descriptor: int, operation: int) -> None:
            raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(module, "fcntl", None if missing == "the module" else Without)
    with RunLock(tmp_path) as lock:
        assert not lock.is_exclusive
