"""Built-in data sources: the Python files of this machine's standard library, whole or as functions."""

from __future__ import annotations

import ast
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from bigbatch.errors import InputError
from bigbatch.lm.data.documents import Corpus, Document
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
    texts, notes = _read_texts()
    documents = tuple(Document(name, text=text) for name, text in texts)
    return Corpus(documents, (f"{plural(len(documents), 'file')} of Python's standard library", *notes))


def read_standard_library_functions() -> Corpus:
    """Return every documented function of the standard library: signature and docstring as prompt, body as completion.

    Includes functions, methods, coroutines and nested functions, without decorators. Exact duplicates are kept once.

    Raises:
        InputError: The standard library has no files (see :func:`standard_library_files`).
    """
    texts, notes = _read_texts()
    unique: dict[str, Document] = {}
    found = 0
    unparsed = 0
    for name, text in texts:
        try:
            functions = list(documented_functions(text, name))
        except SyntaxError:
            unparsed += 1
            continue
        found += len(functions)
        for function in functions:
            unique.setdefault(function.key, function)
    if unparsed:
        notes.append(f"{plural(unparsed, 'file')} with invalid syntax for Python {_VERSION} left out")
    if found > len(unique):
        notes.append(f"{plural(found - len(unique), 'exact duplicate')} left out")
    about = f"{plural(len(unique), 'documented function')} of {plural(len(texts), 'file')} of Python's standard library"
    return Corpus(tuple(unique.values()), (about, *notes))


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


def _read_texts() -> tuple[list[tuple[str, str]], list[str]]:
    """Return (path relative to the standard library, text) of its files, and notes on those left out."""
    root = _root()
    texts: list[tuple[str, str]] = []
    empty = 0
    unreadable = 0
    for path in standard_library_files():
        try:
            with tokenize.open(path) as file:  # in the encoding that the file declares
                text = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            unreadable += 1
            continue
        if text.strip():
            texts.append((path.relative_to(root).as_posix(), text))
        else:
            empty += 1
    notes = [f"{plural(empty, 'empty file')} left out"] if empty else []
    if unreadable:
        notes.append(f"{plural(unreadable, 'unreadable file')} left out")
    return texts, notes


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _is_left_out(part: str) -> bool:
    # config-VERSION-PLATFORM has the Makefile and the configuration of the build.
    return part in LEFT_OUT_FOLDERS or part.startswith("config-")


_VERSION = sysconfig.get_python_version()
