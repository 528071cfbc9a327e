"""An entry of the cache is complete or does not exist, is written once, and is found by every process."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bigbatch.errors import BigbatchError, InputError
from bigbatch.lm.data.token_store.cache import Cache, default_cache


def read(folder: Path) -> str:
    try:
        return (folder / "content").read_text()
    except OSError as error:
        raise InputError("damaged") from error


def write(folder: Path) -> None:
    (folder / "content").write_text("whole")


def fail(folder: Path) -> None:
    raise AssertionError("it was built before")


def test_entry_is_built_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert cache.folder("tokens", "a", load=read, build=write) == "whole"
    assert cache.has_written
    again = Cache(tmp_path / "cache")
    assert again.folder("tokens", "a", load=read, build=fail) == "whole"
    assert not again.has_written


def test_damaged_entry_is_built_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.folder("tokens", "a", load=read, build=write)
    (tmp_path / "tokens" / "a" / "content").unlink()
    assert cache.folder("tokens", "a", load=read, build=write) == "whole"


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        write(folder)
        raise InputError("a.jsonl:3 is broken.")

    with pytest.raises(InputError, match=r"^a\.jsonl:3 is broken\.$"):
        Cache(tmp_path).folder("tokens", "a", load=read, build=build)
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == ["a.error", "a.lock"]
    assert Cache(tmp_path).entries() == []
    assert Cache(tmp_path).folder("tokens", "a", load=read, build=write) == "whole"
    assert not (tmp_path / "tokens" / "a.error").exists()


def test_others_raise_the_error_of_the_one_that_builds(tmp_path: Path) -> None:
    may_finish = threading.Event()
    builds: list[int] = []
    errors: list[str] = []
    waiting: set[int] = set()

    def wait() -> None:
        waiting.add(threading.get_ident())
        if len(waiting) == 2:
            may_finish.set()

    def build(folder: Path) -> None:
        builds.append(1)
        assert may_finish.wait(30)
        raise InputError("a.jsonl:3 is broken.")

    def start() -> None:
        try:
            Cache(tmp_path).folder("tokens", "a", load=read, build=build, on_wait=wait)
        except InputError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == ["a.jsonl:3 is broken."] * 3
    assert builds == [1]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            errno.ENOSPC,
            r"cannot be written: no space left on device\. Free some space, or pass --cache DIR with a folder ",
        ),
        (
            errno.EACCES,
            r"cannot be written: permission denied\. Pass --cache DIR with a folder that can be written, or -",
        ),
    ],
    ids=["full", "forbidden"],
)
def test_unwritable_cache_is_one_sentence(tmp_path: Path, number: int, message: str) -> None:
    def build(folder: Path) -> None:
        write(folder)
        raise OSError(number, os.strerror(number), str(folder))

    with pytest.raises(BigbatchError, match=rf"^the token cache .* {message}"):
        Cache(tmp_path).folder("tokens", "a", load=read, build=build)
    assert not list(tmp_path.rglob("*.partial"))


def test_file_in_place_of_cache_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(BigbatchError, match=r"cannot be written: not a directory\. Pass --cache DIR"):
        Cache(tmp_path / "cache").folder("tokens", "a", load=read, build=write)


def test_others_wait_and_use_what_one_builds(tmp_path: Path) -> None:
    may_finish, waiting = threading.Event(), threading.Event()
    builds: list[int] = []

    def build(folder: Path) -> None:
        builds.append(1)
        assert may_finish.wait(30)
        write(folder)

    def wait() -> None:
        waiting.set()
        may_finish.set()

    found: list[str] = []

    def start() -> None:
        found.append(Cache(tmp_path).folder("tokens", "a", load=read, build=build, on_wait=wait))

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == ["whole"] * 3
    assert builds == [1]
    assert waiting.is_set()


KILLED = """
import os, signal, sys
from pathlib import Path
from bigbatch.lm.data.token_store.cache import Cache

def build(folder):
    (folder / "content").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

Cache(Path(sys.argv[1])).folder("tokens", sys.argv[2], load=lambda folder: None, build=build)
"""


def test_killed_build_is_never_used_and_removed(tmp_path: Path) -> None:
    for key in ("a", "b"):
        run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), key], check=False)
        assert run.returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*.partial"))) >= 1
    cache = Cache(tmp_path)
    assert cache.entries() == []
    assert cache.folder("tokens", "a", load=read, build=write) == "whole"
    assert not list(tmp_path.rglob("*.partial"))  # not even of the other entry


def test_folder_of_live_process_is_kept(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        Cache(tmp_path).folder("tokens", "b", load=read, build=write)
        assert folder.is_dir()
        write(folder)

    assert Cache(tmp_path).folder("tokens", "a", load=read, build=build) == "whole"


def test_temporary_cache_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache = Cache(None)
    assert cache.folder("tokens", "a", load=read, build=write) == "whole"
    cache.release()
    assert list(tmp_path.iterdir()) == []


def test_entries_are_listed_and_removed_by_last_use(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for key in ("old", "new"):
        cache.folder("tokens", key, load=read, build=write)
    os.utime(tmp_path / "tokens" / "old", (0, 0))
    assert [entry.path.name for entry in cache.entries()] == ["new", "old"]
    assert [entry.num_bytes for entry in cache.entries()] == [5, 5]
    cache.remove([entry for entry in cache.entries() if entry.used_s < time.time() - 60])
    assert [entry.path.name for entry in cache.entries()] == ["new"]


def test_use_of_entry_is_recorded(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.folder("tokens", "a", load=read, build=write)
    os.utime(tmp_path / "tokens" / "a", (0, 0))
    cache.folder("tokens", "a", load=read, build=fail)
    assert cache.entries()[0].used_s > 0


def test_default_cache_follows_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "bigbatch"
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_cache() == tmp_path / ".cache" / "bigbatch"
