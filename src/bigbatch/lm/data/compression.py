"""Open regular and compressed files by their names, and recognize content that the name does not announce.

path → .gz, .bz2, .xz, .zst → bytes, streamed; inner_name: a.jsonl.gz → a.jsonl
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfileobj
from typing import Any, BinaryIO, cast

from bigbatch.errors import InputError, first_line, os_reason

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
HEAD_BYTES = 512

_COMPRESSED = {
    b"\x1f\x8b": ".gz",
    b"\xfd7zXZ\0": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
}
_OTHERS = {
    b"PAR1": ("a Parquet file", "End its name with .parquet"),
    b"ARROW1\0\0": ("an Arrow file", "End its name with .arrow"),
    b"PK\x03\x04": ("a zip archive or a document of an office program", "Unpack it, or export it as text or .csv"),
    b"%PDF-": ("a PDF document", "Extract its text"),
    b"SQLite format 3\0": ("a database", "Export it as .jsonl or .csv"),
    b"\x89PNG\r\n": ("an image", "Remove it"),
    b"\xff\xd8\xff": ("an image", "Remove it"),
    b"version https://git-lfs.github.com/spec/": ("a pointer of Git LFS and not the data", "Run git lfs pull"),
}
_UTF = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def inner_name(name: str) -> str:
    """Return a file name without the suffix of its compression: ``a.jsonl`` for ``a.jsonl.gz``."""
    stem, suffix = Path(name).stem, Path(name).suffix
    return stem if suffix.lower() in COMPRESSIONS and stem else Path(name).name


def inner_suffix(name: str) -> str:
    """Return the suffix of a file name without that of its compression, in lower case."""
    return Path(inner_name(name)).suffix.lower()


def is_compressed(path: Path) -> bool:
    """Return whether the name of a file announces a compression."""
    return path.suffix.lower() in COMPRESSIONS


@contextmanager
def open_content(path: Path, source: str) -> Iterator[BinaryIO]:
    """Open a file for reading and decompress it as its name says; errors while it is read are one sentence.

    Args:
        path: A regular file.
        source: Names it in messages.

    Raises:
        InputError: It cannot be read or decompressed, or its first bytes are those of another kind of file.
    """
    try:
        with _open(path) as file:
            _check_head(file.read(HEAD_BYTES), path, source)
        with _open(path) as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, source, error) from None
    except OSError as error:
        if is_compressed(path) and error.errno is None:  # from the decompressor, not from the operating system
            raise _damaged(path, source, error) from None
        raise InputError(f"cannot read {error.filename or source}: {os_reason(error)}.") from None


@contextmanager
def open_seekable(path: Path, source: str) -> Iterator[Any]:
    """Open a file for random access; a compressed one is decompressed into a temporary file first.

    Raises:
        InputError: As :func:`open_content`.
    """
    with open_content(path, source) as file:
        if not is_compressed(path):
            yield file
            return
        with tempfile.TemporaryFile() as copy:
            copyfileobj(file, copy, 2**20)
            copy.seek(0)
            yield copy


def decode_utf8(data: bytes, source: str, offset: int = 0) -> str:
    """Decode UTF-8 bytes that start at byte ``offset`` of the file.

    Raises:
        InputError: Invalid UTF-8; the message has the offset of the first invalid byte, from 0, in the file.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(not_utf8(source, data[error.start], offset + error.start)) from None


def not_utf8(source: str, byte: int, offset: int | None = None) -> str:
    """Return the sentence for a byte that is not UTF-8, with its offset in the file if it is known."""
    place = "" if offset is None else f" at offset {offset:,}"
    return f"{source} is not UTF-8: byte 0x{byte:02x}{place}. Convert it to UTF-8, or remove it."


def _open(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(cast(Any, pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")), 2**16)
    opened: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix, open)
    return cast(BinaryIO, opened(path, "rb"))


def _damaged(path: Path, source: str, error: Exception) -> InputError:
    return InputError(f"{source} is not a whole {path.suffix.lower()} file: {first_line(error)}. Restore it.")


def _check_head(head: bytes, path: Path, source: str) -> None:
    """Raise if the first bytes, decompressed, are those of a kind of file that the name does not announce."""
    suffix = inner_suffix(path.name)
    if suffix in ARCHIVES or head[257:262] == b"ustar":
        raise InputError(f"{source} is an archive of files: unpack it, and pass the folder.")
    compression = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
    if re.match(rb"BZh[1-9](1AY&SY|\x17\x72\x45)", head):
        compression = ".bz2"
    if compression is not None or suffix in COMPRESSIONS:
        if is_compressed(path):
            raise InputError(f"{source} is compressed twice: decompress it once.")
        raise InputError(f"{source} is compressed, and its name does not say so: end it with {compression}.")
    if encoding := next((name for mark, name in _UTF.items() if head.startswith(mark)), None):
        raise InputError(f"{source} is {encoding}: convert it to UTF-8, as with iconv -f {encoding} -t UTF-8.")
    expected = {".parquet": b"PAR1", ".arrow": b"ARROW1\0\0"}.get(suffix)
    for magic, (kind, remedy) in _OTHERS.items():
        if head.startswith(magic) and magic != expected:
            raise InputError(f"{source} is {kind}. {remedy}.")
