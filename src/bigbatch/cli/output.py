"""Output streams that survive closed pipes, full disks and narrow encodings, and text without control characters.

    text → visible (no control character) → wrapped at words on a terminal → GuardedStream → stdout or stderr

Loads no terminal library: help and errors are printed with this module alone.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from bigbatch.errors import BigbatchError, os_reason

# C0 and C1 control characters, line separators, bidirectional embeddings, overrides and isolates, and surrogates,
# which stand for undecodable bytes of file names.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_ENCODING_ERRORS = "bigbatch.transliterate"
_ASCII = {
    "…": "...", "·": "-", "│": "|", "×": "x", "√": "sqrt ", "→": "->", "−": "-", "–": "-", "—": "-", "█": "#",
    "░": ".", "β": "beta", "≤": "<=", "≥": ">=", "Σ": "sum ", "∇": "grad ", "━": "-", "“": '"', "”": '"', "’": "'",
}  # fmt: skip


class OutputError(BigbatchError):
    """Standard output cannot be written. The message is empty if its reader closed it, as ``head`` does."""


def visible(text: str, *, keep: str = "") -> str:
    r"""Replace each control character by its escape sequence, such as ``\x1b`` or ``\u202e``.

    A terminal would obey them: they move the cursor, erase lines, set the title or reverse the order of the text.

    Args:
        text: Any text, such as the name of a file or the output of a model.
        keep: Control characters to keep, such as newlines.
    """
    return _CONTROL.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def wrap(line: str, width: int) -> str:
    """Break a line at spaces so that it fits a terminal; continuation lines are indented by two more columns.

    Longer words, such as paths, are not broken.
    """
    if len(line) <= width:
        return line
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(
        line, max(width, 20), subsequent_indent=f"{indent}  ", break_long_words=False, break_on_hyphens=False
    )


def print_error(prefix: str, message: str) -> None:
    """Print ``bigbatch COMMAND: message`` to stderr as one line, broken at spaces on a terminal."""
    line = visible(f"{prefix}: {message}")
    print(wrap(line, shutil.get_terminal_size().columns) if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


class GuardedStream:
    """A text stream that writes nothing more after a write error, which is passed to a handler.

    Args:
        stream: The stream; its other attributes are those of this object.
        on_error: Called once, with the first write error; it may raise.
    """

    def __init__(self, stream: TextIO, on_error: Callable[[OSError], None]) -> None:
        self._stream = stream
        self._on_error = on_error
        self._has_failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, and return its length; discard it after an error."""
        return self._try(lambda: self._stream.write(text), default=len(text))

    def flush(self) -> None:
        """Flush the stream; do nothing after an error."""
        self._try(lambda: self._stream.flush() or 0, default=0)

    @contextmanager
    def handling(self, on_error: Callable[[OSError], None]) -> Iterator[None]:
        """Call another handler within the context."""
        before, self._on_error = self._on_error, on_error
        try:
            yield
        finally:
            self._on_error = before

    def _try(self, operation: Callable[[], int], *, default: int) -> int:
        if self._has_failed:
            return default
        try:
            return operation()
        except OSError as error:
            self._has_failed = True
            # What is buffered would be written again, and fail again, when the interpreter ends.
            with suppress(OSError, ValueError), Path(os.devnull).open("wb") as devnull:
                os.dup2(devnull.fileno(), self._stream.fileno())
            self._on_error(error)
            return default


@contextmanager
def guarded_output() -> Iterator[None]:
    """Guard stdout and stderr within the context; restore them on exit.

    Characters that the encoding of a stream lacks are replaced by similar ASCII ones. An error on stdout raises
    `OutputError`, one on stderr is ignored. A stream that was closed before the start discards its output; its
    descriptor is opened, or the next file that is opened, such as a checkpoint, would receive the output.
    """
    codecs.register_error(_ENCODING_ERRORS, _transliterate)
    _open_standard_descriptors()
    streams = sys.stdout, sys.stderr
    with Path(os.devnull).open("w", encoding="utf-8") as devnull:
        sys.stdout, sys.stderr = (
            GuardedStream(devnull if stream is None else stream, on_error)
            for stream, on_error in zip(streams, (_raise, _ignore), strict=True)
        )
        format_warning = warnings.formatwarning
        warnings.formatwarning = lambda *words, **more: visible(format_warning(*words, **more), keep="\n")
        with _encoding_errors(streams[0]), _encoding_errors(streams[1]):
            try:
                yield
            finally:
                warnings.formatwarning = format_warning
                sys.stdout, sys.stderr = streams


@contextmanager
def optional_output(prefix: str) -> Iterator[None]:
    """Within the context, an error on stdout is reported on stderr and ends nothing: a run is worth more than its log.

    Args:
        prefix: The command, for the message.
    """

    def report(error: OSError) -> None:
        print_error(
            prefix,
            f"stdout cannot be written ({os_reason(error)}): the run continues without output. Its updates are in "
            "metrics.jsonl in the run directory.",
        )

    if not isinstance(sys.stdout, GuardedStream):
        yield
        return
    with sys.stdout.handling(report):
        yield


@contextmanager
def _encoding_errors(stream: TextIO | None) -> Iterator[None]:
    """Set the encoding errors of a stream that has them."""
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    before = stream.errors
    stream.reconfigure(errors=_ENCODING_ERRORS)
    try:
        yield
    finally:
        with suppress(OSError, ValueError):  # reconfigure() flushes
            stream.reconfigure(errors=before)


def _raise(error: OSError) -> None:
    raise OutputError("" if isinstance(error, BrokenPipeError) else f"stdout cannot be written: {os_reason(error)}.")


def _ignore(error: OSError) -> None:
    """Ignore an error on stderr: there is no place left to report it."""


def _open_standard_descriptors() -> None:
    """Open those of the descriptors 0, 1 and 2 that are closed on the null device."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor, which is this one


def _transliterate(error: UnicodeError) -> tuple[str, int]:
    """Replace the characters that an encoding lacks: by similar ASCII characters, or by their escape sequences."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_ASCII.get(char) or _escape(char) for char in error.object[error.start : error.end]), error.end


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
