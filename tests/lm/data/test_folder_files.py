"""Patterns are expanded in a sorted order, and what they name is read as files and folders are."""

from pathlib import Path

import pytest

from bigbatch.errors import InputError
from bigbatch.lm.data.folder_files import expand_pattern
from bigbatch.lm.data.sources import open_sources, read_corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.txt", "c.md", "sub/d.txt", "sub/deep/e.txt", ".hidden.txt", "x[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["a.txt", "b.txt", "x[1].txt"]),
        ("?.*", ["a.txt", "b.txt", "c.md"]),
        ("[ab].txt", ["a.txt", "b.txt"]),
        ("**/*.txt", ["a.txt", "b.txt", "sub/d.txt", "sub/deep/e.txt", "x[1].txt"]),
        ("s*", ["sub/d.txt", "sub/deep/e.txt"]),
        ("**", ["a.txt", "b.txt", "c.md", "sub/d.txt", "sub/deep/e.txt", "x[1].txt"]),
    ],
)
def test_pattern_names_files_in_order(pattern: str, expected: list[str], folder: Path) -> None:
    files = expand_pattern(str(folder / pattern)).files
    assert [path.relative_to(folder).as_posix() for path in files] == expected
    assert [document.text for document in read_corpus(str(folder / pattern))] == expected


def test_existing_file_is_no_pattern(folder: Path) -> None:
    assert [document.text for document in read_corpus(str(folder / "x[1].txt"))] == ["x[1].txt"]


def test_pattern_is_one_source(folder: Path) -> None:
    (corpus,) = open_sources([str(folder / "*.txt")]).training
    assert corpus.documents
    assert corpus.notes == (f"3 text files from {folder / '*.txt'}",)


def test_pattern_reads_training_split_only(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "validation-0.jsonl", "test-0.jsonl"):
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n')
    opened = open_sources([str(tmp_path / "*.jsonl")])
    assert [document.text for document in opened.training[0]] == ["train-0.jsonl", "train-1.jsonl"]
    assert [document.text for document in opened.validation[0]] == ["validation-0.jsonl"]


def test_relative_pattern_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert [document.source for document in read_corpus("[ab].txt")] == ["a.txt", "b.txt"]
    with pytest.raises(InputError, match=r"^no file matches the pattern 'z\*'\."):
        read_corpus("z*")
