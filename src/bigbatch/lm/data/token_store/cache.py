"""The cache of tokens: folders that are written once, by one process, and used by every later start, resume and rank.

    CACHE/tokens/KEY/       a token store
    CACHE/samples/KEY/      the samples of token stores
    CACHE/tokenizers/KEY/   a tokenizer trained on the data
    CACHE/KIND/KEY.lock     held by the process that writes the folder

A folder is written as KEY.PID.partial, synced, and renamed: it is complete or does not exist. What a killed process
left is removed by the next one that writes.
"""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from filelock import lock_descriptor

from bigbatch.errors import BigbatchError, InputError, os_reason
from bigbatch.lm.files import PARTIAL, read_json, remove, sync_folder

T = TypeVar("T")

LOCK = ".lock"
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # the file system has no locks, as on some clusters
_POLL_S = 0.2


@dataclass(frozen=True)
class Entry:
    """One folder of the cache.

    Attributes:
        path: The folder.
        num_bytes: Size of its files.
        used_s: When it was last used, in seconds since the epoch.
    """

    path: Path
    num_bytes: int
    used_s: float

    def describe(self) -> str:
        """Return what the entry holds, as a few words for the user."""
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            manifest = read_json(self.path / "manifest.json")
            if self.path.parent.name == "shards":
                return f"an index of the shards {manifest['description']['data']}"
            if "description" in manifest:
                return f"tokens of {manifest['description']['data']} for {manifest['model']}"
        return {"samples": "samples of tokens", "tokenizers": "a trained tokenizer"}.get(
            self.path.parent.name, "tokens"
        )


class Cache:
    """A cache of folders.

    Args:
        root: Its folder, created when the first entry is written; None for a temporary one, which `release` removes.
    """

    def __init__(self, root: Path | None) -> None:
        self.is_temporary = root is None
        self.root = Path(tempfile.mkdtemp(prefix="bigbatch-tokens-")) if root is None else root
        self.has_written = False

    def folder(
        self,
        kind: str,
        key: str,
        *,
        load: Callable[[Path], T],
        build: Callable[[Path], object],
        on_wait: Callable[[], object] = lambda: None,
    ) -> T:
        """Return ``load`` of an entry; if it does not exist or is damaged, ``build`` it first, in an empty folder.

        Of several processes that need the same entry, one builds it and the others wait.

        Args:
            kind: Name of its parent folder.
            key: Name of the entry.
            load: Raises `InputError` if the folder is damaged.
            build: Writes the content into an empty folder. Its files are synced by itself.
            on_wait: Called while another process builds it.

        Raises:
            BigbatchError: The cache cannot be written; the message says why, and what to pass.
        """
        target = self.root / kind / key
        has_waited = False

        def wait() -> None:
            nonlocal has_waited
            has_waited = True
            on_wait()

        if (found := _loaded(target, load)) is not None:
            return found[0]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _locked(target, wait) as is_exclusive:
                if (found := _loaded(target, load)) is None:
                    if has_waited:
                        _raise_error_of_other(target)
                    if is_exclusive:
                        _remove_leftovers(target.parent, own=target.name)
                    self._write(target, build)
                    self.has_written = True
        except OSError as error:
            raise self._unwritable(error) from error
        return load(target) if found is None else found[0]

    def release(self) -> None:
        """Remove a temporary cache. What is mapped of it stays usable until it is closed."""
        if self.is_temporary:
            shutil.rmtree(self.root, ignore_errors=True)

    def entries(self) -> list[Entry]:
        """Return every entry, the one that was used last first."""
        folders = [path for kind in _folders(self.root) for path in _folders(kind) if not path.name.endswith(PARTIAL)]
        found = [Entry(path, _size_of(path), _used_s(path)) for path in folders]
        return sorted(found, key=lambda entry: -entry.used_s)

    def remove(self, entries: Iterable[Entry]) -> None:
        """Remove entries, and what killed processes left.

        Runs that are in progress keep what they have mapped.

        Raises:
            BigbatchError: One of them cannot be removed.
        """
        try:
            for entry in entries:
                remove(entry.path)
            for kind in _folders(self.root):
                _remove_leftovers(kind)
        except OSError as error:
            raise BigbatchError(f"{error.filename or self.root} cannot be removed: {os_reason(error)}.") from error

    def _write(self, target: Path, build: Callable[[Path], object]) -> None:
        partial, error_file = target.with_name(f"{target.name}.{os.getpid()}{PARTIAL}"), _error_file(target)
        remove(partial)
        error_file.unlink(missing_ok=True)
        partial.mkdir()
        try:
            build(partial)
            sync_folder(partial)
            remove(target)  # a damaged one
            partial.rename(target)
            sync_folder(target.parent)
        except BaseException as error:
            with suppress(OSError):
                remove(partial)
            if isinstance(error, InputError):
                with suppress(OSError):  # for those that wait: they need not find it again
                    error_file.write_text(str(error), encoding="utf-8")
            raise

    def _unwritable(self, error: OSError) -> BigbatchError:
        where = f"the token cache {self.root}"
        if self.is_temporary:
            where, remedy = f"the temporary folder {self.root}", "Set TMPDIR to a folder on a larger disk"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "Free some space, or pass --cache DIR with a folder on a larger disk"
        else:
            remedy = "Pass --cache DIR with a folder that can be written, or --no-cache"
        return BigbatchError(f"{where} cannot be written: {os_reason(error)}. {remedy}; nothing incomplete is used.")


def default_cache() -> Path:
    """Return ``$XDG_CACHE_HOME/bigbatch``, else ``~/.cache/bigbatch``. A relative value of the variable is ignored."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "bigbatch"


def cache_folder(asked: Path | None) -> tuple[Path | None, str | None]:
    """Return the folder of the cache; None, with a sentence, if none is asked for and the default cannot be written."""
    if asked is not None:
        return asked, None
    try:
        folder = default_cache()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder, None
        reason = "permission denied"
    except OSError as error:
        reason = os_reason(error)
    except RuntimeError:  # of Path.home()
        return (
            None,
            "no folder for the token cache, since there is no home folder: every start tokenizes the data again",
        )
    return None, (
        f"the token cache {folder} cannot be written ({reason}): every start tokenizes the data again. Pass --cache DIR"
    )


def _loaded(folder: Path, load: Callable[[Path], T]) -> tuple[T] | None:
    if not folder.is_dir():
        return None
    try:
        found = load(folder)
    except InputError:  # damaged: built again
        return None
    with suppress(OSError):
        os.utime(folder)
    return (found,)


def _error_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.error")


def _raise_error_of_other(target: Path) -> None:
    """Raise the error of the process that was waited for, if it failed because of its input."""
    with suppress(FileNotFoundError):
        raise InputError(_error_file(target).read_text(encoding="utf-8"))


@contextmanager
def _locked(target: Path, on_wait: Callable[[], object]) -> Iterator[bool]:
    """Hold the lock of an entry, after waiting while another process has it; yield whether the file system has locks.

    Without them, two processes may write the entry, and one of the two is used.
    """
    with _lock_file(target) as descriptor:
        is_locked = _lock(descriptor)
        while is_locked is False:
            on_wait()
            time.sleep(_POLL_S)
            is_locked = _lock(descriptor)
        yield is_locked is not None


def _lock(descriptor: int) -> bool | None:
    """Try to lock a file; return whether that succeeded, None if the file system has no locks."""
    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise


@contextmanager
def _lock_file(target: Path) -> Iterator[int]:
    flags = os.O_RDWR | os.O_CREAT | sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW"))
    descriptor = os.open(target.with_name(target.name + LOCK), flags, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove_leftovers(kind: Path, *, own: str = "") -> None:
    """Remove the partial folders of killed processes: nobody holds their lock, or this process does (``own``)."""
    for partial in kind.glob(f"*{PARTIAL}"):
        key = partial.name.partition(".")[0]
        with suppress(OSError), _lock_file(partial.with_name(key)) as descriptor:
            if key == own or _lock(descriptor):
                remove(partial)


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.is_symlink())
    except OSError:
        return []


def _size_of(folder: Path) -> int:
    with suppress(OSError):
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return 0


def _used_s(folder: Path) -> float:
    with suppress(OSError):
        return folder.stat().st_mtime
    return 0.0
