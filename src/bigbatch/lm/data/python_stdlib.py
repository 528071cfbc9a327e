"""Built-in data sources: the Python files of this machine's standard library, whole or as functions."""

from __future__ import annotations

import ast
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from bigbatch.errors import InputError
from bigbatch.lm.data.corpus import Corpus
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.reading import Reading
from bigbatch.lm.text import plural

LEFT_OUT_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


def standard_library_files() -> list[Path]:
    """Return the ``.py`` files of the standard library, tests and installed packages left out, sorted by path.

    Raises:
        InputError: The standard library of this Python is not stored as files.
    """
    root = _root()
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    included = [name for name in names if not any(_is_left_out(part) for part in name.parts)]
    if not included:
        raise InputError(f"no Python file was found under {root}, so there is no standard library to train on.")
    return [root / name for name in sorted(included, key=Path.as_posix)]


def read_standard_library() -> Corpus:
    """Return every file of the standard library as a text document.

    Raises:
        InputError: The standard library has no files (see :func:`standard_library_files`).
    """
    files = standard_library_files()

    def read(reading: Reading) -> Iterator[Document]:
        counts: Counter[str] = Counter()
        for name, text in _texts(files, counts):
            yield Document(name, text=text)
        reading.about.append(f"{plural(counts['read'], 'file')} of Python's standard library")
        reading.about.extend(_left_out(counts))

    return Corpus(read, name="python-stdlib", files=files)


def read_standard_library_functions() -> Corpus:
    """Return every documented function of the standard library: signature and docstring as prompt, body as completion.

    Includes functions, methods, coroutines and nested functions, without decorators. Exact duplicates are kept once.

    Raises:
        InputError: The standard library has no files (see :func:`standard_library_files`).
    """
    files = standard_library_files()

    def read(reading: Reading) -> Iterator[Document]:
        counts: Counter[str] = Counter()
        unique: set[str] = set()
        for name, text in _texts(files, counts):
            try:
                functions = list(documented_functions(text, name))
            except SyntaxError:
                counts["unparsed"] += 1
                continue
            counts["found"] += len(functions)
            for function in functions:
                if function.key not in unique:
                    unique.add(function.key)
                    yield function
        about = f"{plural(len(unique), 'documented function')} of {plural(counts['read'], 'file')}"
        reading.about.append(f"{about} of Python's standard library")
        reading.about.extend(_left_out(counts))
        if counts["unparsed"]:
            what = f"{plural(counts['unparsed'], 'file')} with invalid syntax for Python {_VERSION}"
            reading.about.append(f"{what} left out")
        if counts["found"] > len(unique):
            reading.about.append(f"{plural(counts['found'] - len(unique), 'exact duplicate')} left out")

    return Corpus(read, name="python-stdlib-functions", files=files)


def documented_functions(text: str, source: str) -> Iterator[Document]:
    r"""Yield the functions of a module that have a docstring and a further body, in line order.

    Prompt and completion are whole lines of the source, without the indentation of the ``def``; together they form
    the function. The body keeps one level of indentation and ends with a newline.

    Args:
        text: Source of the module, with ``\n`` as its only line end.
        source: Names the module; a document's source is ``source:line`` of its ``def``.

    Raises:
        SyntaxError: This Python does not parse the module.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as invalid escapes in files that are only read
        tree = ast.parse(text)
    # Not str.splitlines, which also breaks at form feeds, unlike the parser's line numbers.
    lines = text.split("\n")
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in sorted(functions, key=lambda node: node.lineno):
        end = _docstring_end(node)
        if end is not None:
            first = lines[node.lineno - 1]
            margin = first.removesuffix(first.lstrip())
            prompt = _dedent(lines[node.lineno - 1 : end], margin)
            completion = _dedent(lines[end : node.end_lineno], margin)
            yield Document(f"{source}:{node.lineno}", prompt=prompt, completion=completion)


def _docstring_end(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int | None:
    """Return the last line, from 1, of a docstring that is followed by a body on separate lines; else None."""
    docstring, *body = node.body
    if ast.get_docstring(node, clean=False) is None or all(_is_no_op(statement) for statement in body):
        return None
    shared_line = any(after.lineno == before.end_lineno for before, after in pairwise(node.body[:2]))
    return None if shared_line else docstring.end_lineno


def _is_no_op(statement: ast.stmt) -> bool:
    """Return whether a statement is ``pass``, ``...`` or another bare constant."""
    is_constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_constant or isinstance(statement, ast.Pass)


def _dedent(lines: list[str], margin: str) -> str:
    # A line of a multi-line string may be indented less; it stays as it is.
    return "".join(line.removeprefix(margin) + "\n" for line in lines)


def _texts(files: Sequence[Path], counts: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yield (path relative to the standard library, text) of its files; count those read, empty and unreadable."""
    root = _root()
    for path in files:
        try:
            with tokenize.open(path) as file:  # in the encoding that the file declares
                text = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            counts["unreadable"] += 1
            continue
        if text.strip():
            counts["read"] += 1
            yield path.relative_to(root).as_posix(), text
        else:
            counts["empty"] += 1


def _left_out(counts: Counter[str]) -> list[str]:
    return [f"{plural(counts[kind], f'{kind} file')} left out" for kind in ("empty", "unreadable") if counts[kind]]


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _is_left_out(part: str) -> bool:
    # config-VERSION-PLATFORM has the Makefile and the configuration of the build.
    return part in LEFT_OUT_FOLDERS or part.startswith("config-")


_VERSION = sysconfig.get_python_version()
