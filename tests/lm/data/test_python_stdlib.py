"""The built-in sources give this machine's own Python files, whole and as functions."""

import ast
import sysconfig
from pathlib import Path

import pytest

from bigbatch.errors import InputError
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.python_stdlib import documented_functions, standard_library_files
from bigbatch.lm.data.sources import read_corpus

MODULE = '''\
import os

def plain(a):
    """Say what."""
    # A reason.

    return a + 1


class Case:
    @property
    async def method(self):
        """
        Longer,
          indented.
        """
        text = """
less indented
        """
        def inner():
            "Inner."
            yield text
        return inner

    def nothing(self):
        """Only this."""

    def still_nothing(self):
        """Only this."""
        ...
        pass

def undocumented():
    return 1

def one_line(): "A line."; return 1

def shared():
    "A line."; a = 1
    return a

def last():
    """No newline after it."""
    return "\f"'''


@pytest.fixture(scope="module")
def functions() -> tuple[Document, ...]:
    return read_corpus("python-stdlib-functions").documents


def test_files_are_sorted_without_tests_and_installed_packages() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in standard_library_files()]
    assert names == sorted(names)
    assert len(names) > 300
    assert {"ast.py", "json/decoder.py", "os.py"} <= set(names)
    left_out = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    for name in names:
        assert not left_out & set(name.split("/")[:-1])
        assert not name.startswith("config-")


def test_every_file_is_read_or_counted() -> None:
    corpus = read_corpus("python-stdlib")
    documents = corpus.documents
    assert corpus.notes[0] == f"{len(documents):,} files of Python's standard library"
    left_out = sum(int(note.split()[0]) for note in corpus.notes[1:])
    assert len(documents) + left_out == len(standard_library_files())
    assert all(document.text and document.text.strip() for document in documents)


def test_file_is_read_in_its_declared_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "a.py").write_bytes("# coding: latin-1\nx = 'é'\n".encode("latin-1"))
    (tmp_path / "b.py").write_bytes(b"x = '\xe9'\n")
    (tmp_path / "c.py").write_bytes(b"\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "d.py").write_bytes(b"x = 1\n")
    corpus = read_corpus("python-stdlib")
    assert [document.text for document in corpus.documents] == ["# coding: latin-1\nx = 'é'\n"]
    assert corpus.notes == (
        "1 file of Python's standard library",
        "1 empty file left out",
        "1 unreadable file left out",
    )


def test_unparsable_files_and_duplicates_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text('def f():\n    "Doc."\n    return "\\d"\n')
    (tmp_path / "c.py").write_text("print 1\n")
    corpus = read_corpus("python-stdlib-functions")
    assert [document.source for document in corpus.documents] == ["a.py:1"]
    assert corpus.notes[0] == "1 documented function of 3 files of Python's standard library"
    assert "invalid syntax" in corpus.notes[1]
    assert corpus.notes[2] == "1 exact duplicate left out"


def test_missing_standard_library_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="there is no standard library to train on"):
        read_corpus("python-stdlib")


def test_documented_functions_are_split_into_prompt_and_body() -> None:
    found = {document.source: document for document in documented_functions(MODULE, "m.py")}
    assert list(found) == ["m.py:3", "m.py:12", "m.py:20", "m.py:42"]
    assert found["m.py:3"].prompt == 'def plain(a):\n    """Say what."""\n'
    assert found["m.py:3"].completion == "    # A reason.\n\n    return a + 1\n"
    method = found["m.py:12"]
    assert method.prompt == 'async def method(self):\n    """\n    Longer,\n      indented.\n    """\n'
    assert method.completion is not None
    assert method.completion.startswith('    text = """\nless indented\n    """\n    def inner():\n')
    assert found["m.py:20"].prompt == 'def inner():\n    "Inner."\n'
    assert found["m.py:20"].completion == "    yield text\n"
    assert found["m.py:42"].completion == '    return "\f"\n'


def test_every_function_parses_and_ends_with_newline(functions: tuple[Document, ...]) -> None:
    assert len(functions) > 2000
    assert len({document.key for document in functions}) == len(functions)
    for document in functions:
        assert document.prompt is not None
        assert document.completion is not None
        assert document.completion.endswith("\n")
        assert document.completion.strip()
    for document in functions[::10]:
        (node,) = ast.parse(f"{document.prompt}{document.completion}").body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(node) is not None
        assert not node.decorator_list
