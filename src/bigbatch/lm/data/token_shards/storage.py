"""Files of any storage that fsspec knows, by path or URL: s3://, gs://, https://, file:// and others.

URL → library for its protocol → file system, path → listing | file | range of bytes
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bigbatch.errors import InputError, first_line, os_reason

BLOCK_BYTES = 2**20  # of a file that is read at a time
REMOTE_EXTRA = "streaming"  # of bigbatch, with the libraries of `_IN_EXTRA`
_IN_EXTRA = ("s3fs", "gcsfs")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# Of what a file system knows about a file, the first of these changes with its content.
_VERSIONS = ("ETag", "etag", "md5Hash", "crc32c", "generation", "LastModified", "last_modified", "mtime", "created")


def is_url(name: str) -> bool:
    """Return whether a name is a URL."""
    return _URL.match(name) is not None


def check_url(url: str) -> None:
    """Check that a library for the protocol of a URL is installed. No request.

    Raises:
        InputError: It is not, or the protocol is unknown.
    """
    from fsspec.registry import known_implementations

    match = _URL.match(url)
    assert match is not None, "is_url() is true"
    known = known_implementations.get(match[1])
    if known is None:
        raise InputError(
            f"{url}: no protocol is named {match[1]!r}. Pass a path, or a URL of s3://, gs:// or https://."
        )
    library = known["class"].partition(".")[0]
    needed = ("aiohttp",) if match[1] in ("http", "https") else (library,)
    missing = next((name for name in needed if find_spec(name) is None), None)
    if missing is not None:
        how = f"pip install 'bigbatch[{REMOTE_EXTRA}]'" if missing in _IN_EXTRA else f"pip install {missing}"
        raise InputError(f"{url} cannot be read without the library {missing}. Install it: {how}.")


@dataclass(frozen=True)
class StoredFile:
    """A file of a storage.

    Attributes:
        path: As its file system names it.
        size: In bytes.
        state: A value that changes when its content does, if the storage has one.
    """

    path: str
    size: int
    state: str


@dataclass(frozen=True)
class Storage:
    """A place with files: a folder or a prefix.

    Attributes:
        name: As the user named it.
        root: Path of it, as its file system names it.
        is_local: Whether it is on this machine.
    """

    name: str
    root: str
    is_local: bool

    @classmethod
    def of(cls, name: str) -> Storage:
        """Return the storage of a path or URL.

        Raises:
            InputError: The library for it is not installed.
        """
        if not is_url(name):
            return cls(name, str(Path(name).absolute()), is_local=True)
        check_url(name)
        from fsspec.core import url_to_fs

        with errors_of(name):
            fs, path = url_to_fs(name)
        return cls(name, path.rstrip("/"), is_local="file" in _protocols(fs))

    @cached_property
    def fs(self) -> Any:
        """The file system."""
        from fsspec.core import url_to_fs

        return url_to_fs(self.name if is_url(self.name) else self.root)[0]

    def child(self, name: str) -> Storage:
        """Return a folder in this one."""
        return Storage(f"{self.name.rstrip('/')}/{name}", f"{self.root}/{name}", self.is_local)

    def name_of(self, path: str) -> str:
        """Return the name of a file in messages: below that of the storage."""
        return f"{self.name.rstrip('/')}{path.removeprefix(self.root)}" if path.startswith(f"{self.root}/") else path

    def exists(self, name: str = "") -> bool:
        """Return whether it, or a file in it, exists."""
        with errors_of(self.name):
            return bool(self.fs.exists(f"{self.root}/{name}" if name else self.root))

    def folders(self) -> list[str]:
        """Return the names of the folders in it, sorted."""
        with errors_of(self.name):
            if not self.fs.isdir(self.root):
                return []
            entries = self.fs.ls(self.root, detail=True)
        return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory")

    def files(self, pattern: str | None = None) -> list[StoredFile]:
        """Return the files below it, or those of a pattern below the root of the storage, sorted by path."""
        with errors_of(self.name):
            found: Mapping[str, Any]
            if pattern is not None:
                found = self.fs.glob(pattern, detail=True)
            elif self.fs.isfile(self.root):
                found = {self.root: self.fs.info(self.root)}
            else:
                found = self.fs.find(self.root, detail=True)
        return [
            StoredFile(path, int(info["size"] or 0), _state(info))
            for path, info in sorted(found.items())
            if info["type"] == "file"
        ]

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Return the bytes of a file, or some of them."""
        with errors_of(self.name):
            data: bytes = self.fs.cat_file(path, start=start, end=stop)
        if start is not None and stop is not None and len(data) != stop - start:
            raise InputError(
                f"{self.name_of(path)}: {stop - start:,} bytes from {start:,} on were requested, and the storage sent "
                f"{len(data):,}. The file was changed, or the storage does not send parts of files."
            )
        return data

    @contextmanager
    def open(self, path: str) -> Iterator[Any]:
        """Open a file to read it from the beginning, with random access."""
        with errors_of(self.name), self.fs.open(path, "rb") as file:
            # Files of remote storages are read in blocks, and have no readline(size).
            yield file if isinstance(file, io.BufferedIOBase) else io.BufferedReader(file, BLOCK_BYTES)


@contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Raise the errors of a file system as one sentence.

    Raises:
        InputError: An error of the storage.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{name} cannot be read: {error.filename or first_line(error)} does not exist.") from None
    except OSError as error:
        reason = os_reason(error) if error.errno is not None else first_line(error)
        raise InputError(f"{name} cannot be read: {reason}.") from None
    except GeneratorExit:
        raise
    except Exception as error:
        if type(error).__module__.startswith(("bigbatch", "builtins")):
            raise
        raise InputError(f"{name} cannot be read: {type(error).__name__}: {first_line(error)}.") from None


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _state(info: Mapping[str, Any]) -> str:
    return next((f"{name} {info[name]}" for name in _VERSIONS if info.get(name) is not None), "")
