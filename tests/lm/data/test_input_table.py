"""Every format, shape and compression gives the same documents; hostile input is counted or refused in a sentence."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigbatch.cli import main
from bigbatch.errors import InputError
from bigbatch.lm.data.corpus import Corpus
from bigbatch.lm.data.json_files import LARGEST_RECORD
from bigbatch.lm.data.reading import SKIP_ADVICE
from bigbatch.lm.data.records import to_document
from bigbatch.lm.data.sources import ReadOptions, open_sources

SHAPES: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "NA"}, {"text": 'été, "007"\nnull\t'}, {"text": "null"}],
    "completion": [{"prompt": "1, 2", "completion": "007"}, {"prompt": "", "completion": "N/A"}],
    "messages": [
        {"messages": [{"role": "user", "content": "Hallo?"}, {"role": "assistant", "content": "Grüß dich."}]},
        {"messages": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "3"}]},
    ],
    "sharegpt": [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
    "alpaca": [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hi"},
    ],
    "tokens": [{"input_ids": [5, 0, 7], "labels": [-100, 0, 7]}, {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}],
}
FLAT = ("text", "completion", "alpaca")
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def json_lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def table_of(records: list[dict[str, Any]], delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, records[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def parquet(records: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), sink)
    return sink.getvalue()


def arrow(records: list[dict[str, Any]], open_writer: Callable[..., Any]) -> bytes:
    table = pa.Table.from_pylist(records)
    sink = io.BytesIO()
    with open_writer(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return sink.getvalue()


FORMATS: dict[str, tuple[str, Callable[[list[dict[str, Any]]], bytes]]] = {
    "jsonl": (".jsonl", json_lines),
    "ndjson-crlf": (".ndjson", lambda records: json_lines(records).replace(b"\n", b"\r\n")),
    "jsonl-without-end": (".JSONL", lambda records: json_lines(records).rstrip()),
    "json-list": (".json", lambda records: json.dumps(records).encode()),
    "json-indented": (".json", lambda records: json.dumps(records, indent=2, ensure_ascii=False).encode()),
    "json-lines": (".json", json_lines),
    "json-wrapped": (".json", lambda records: json.dumps({"version": 1, "data": records}, indent=1).encode()),
    "json-marked": (".json", lambda records: b"\xef\xbb\xbf" + json.dumps(records).encode()),
    "csv": (".csv", lambda records: table_of(records, ",")),
    "csv-marked": (".csv", lambda records: b"\xef\xbb\xbf" + table_of(records, ",")),
    "csv-semicolons": (".csv", lambda records: table_of(records, ";")),
    "tsv": (".tsv", lambda records: table_of(records, "\t")),
    "parquet": (".parquet", parquet),
    "arrow-file": (".arrow", lambda records: arrow(records, pa.ipc.new_file)),
    "arrow-stream": (".arrow", lambda records: arrow(records, pa.ipc.new_stream)),
}
MATRIX = [
    (kind, shape, compression)
    for kind, (suffix, _) in FORMATS.items()
    for shape in SHAPES
    for compression in COMPRESS
    if (shape in FLAT or suffix not in (".csv", ".tsv")) and not (kind == "csv-semicolons" and shape == "text")
]


def read(path: Path | str, **options: Any) -> Corpus:
    """Return the training data of a source after one pass over it."""
    (corpus,) = open_sources([str(path)], options=ReadOptions(**options)).training
    assert corpus.documents
    return corpus


def texts(path: Path | str, **options: Any) -> list[str | None]:
    return [document.text for document in read(path, **options)]


@pytest.mark.parametrize(("kind", "shape", "compression"), MATRIX)
def test_documents_are_same_in_every_format(kind: str, shape: str, compression: str, tmp_path: Path) -> None:
    suffix, encode = FORMATS[kind]
    path = tmp_path / f"a:b{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](encode(SHAPES[shape])))
    corpus = read(path)
    expected = [to_document(record, "x") for record in SHAPES[shape]]
    assert [document.key for document in corpus] == [document.key for document in expected]
    assert [document.key for document in corpus] == [document.key for document in expected]  # again
    assert any(note.startswith(f"{len(expected)} record") for note in corpus.notes)
    assert not corpus.left_out
    assert all(document.source.startswith(f"{path}:") for document in corpus)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a", "a.unknown"])
def test_text_is_one_document(name: str, compression: str, tmp_path: Path) -> None:
    text = "Füße, 你好\r\n\tNA\u2028 [1, 2]\n{not: json}\n"
    (tmp_path / (name + compression)).write_bytes(COMPRESS[compression](b"\xef\xbb\xbf" + text.encode()))
    assert texts(tmp_path / (name + compression)) == [text]


def write(content: bytes | str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_parquet(**columns: Any) -> Callable[[Path], object]:
    return lambda path: pq.write_table(pa.table(columns), path)


def write_tar(*names: str) -> Callable[[Path], object]:
    def build(path: Path) -> None:
        with tarfile.open(path, "w") as archive:
            for name in names:
                archive.addfile(tarfile.TarInfo(name))

    return build


def write_index(content: object) -> Callable[[Path], object]:
    return lambda path: (path.mkdir(), (path / "index.json").write_text(json.dumps(content)))


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")


GOOD = '{"text": "good"}\n'
CAFE = b"caf\xe9 au lait\n"
RANDOM = os.urandom(2000).hex().encode()
HOSTILE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "empty text": ("a.txt", write(b""), "{} is empty: it yields no training token."),
    "empty JSON lines": ("a.jsonl", write(b""), "{} is empty: it yields no training token."),
    "empty JSON": ("a.json", write(b""), "{} is empty: it yields no training token."),
    "empty JSON list": ("a.json", write(b"[ ]"), "{} is empty: it yields no training token."),
    "empty CSV": ("a.csv", write(b""), "{} is empty: it yields no training token."),
    "CSV of a header alone": ("a.csv", write("text\n"), "{} is empty: it yields no training token."),
    "empty Parquet": ("a.parquet", write(b""), "{} cannot be read as a Parquet file: "),
    "empty Arrow": ("a.arrow", write(b""), "{} is empty: it yields no training token."),
    "empty gz": ("a.jsonl.gz", write(gzip.compress(b"")), "{} is empty: it yields no training token."),
    "zero bytes of gz": ("a.jsonl.gz", write(b""), "{} is empty: it yields no training token."),
    "only a mark": ("a.txt", write(b"\xef\xbb\xbf"), "{} contains only white space: it yields no training token."),
    "only a mark in JSON lines": ("a.jsonl", write(b"\xef\xbb\xbf"), "{} is empty: it yields no training token."),
    "only a mark in CSV": ("a.csv", write(b"\xef\xbb\xbf"), "{} is empty: it yields no training token."),
    "only a mark in JSON": ("a.json", write(b"\xef\xbb\xbf"), "{} is empty: it yields no training token."),
    "white space": ("a.md", write(b" \n\t\n"), "{} contains only white space: it yields no training token."),
    "truncated gz": (
        "a.jsonl.gz",
        write(gzip.compress(RANDOM)[:-500]),
        "{} is not a whole .gz file: Compressed file ended before the end-of-stream marker was reached. Restore it.",
    ),
    "truncated bz2": ("a.txt.bz2", write(bz2.compress(RANDOM)[:-50]), "{} is not a whole .bz2 file: "),
    "truncated xz": ("a.txt.xz", write(lzma.compress(RANDOM)[:-50]), "{} is not a whole .xz file: "),
    "truncated zst": (
        "a.txt.zst",
        write(pa.compress(RANDOM, "zstd", asbytes=True)[:-50]),
        "{} is not a whole .zst file: ",
    ),
    "text named gz": ("a.txt.gz", write(b"plain text"), "{} is not a whole .gz file: Not a gzipped file (b'pl')."),
    "text named bz2": ("a.txt.bz2", write(b"plain text"), "{} is not a whole .bz2 file: Invalid data stream."),
    "text named xz": ("a.txt.xz", write(b"plain text"), "{} is not a whole .xz file: Input format not supported"),
    "text named zst": ("a.txt.zst", write(b"plain text"), "{} is not a whole .zst file: "),
    "gz of gz": (
        "a.jsonl.gz",
        write(gzip.compress(gzip.compress(b"{}"))),
        "{} is compressed twice: decompress it once.",
    ),
    "gz of gz by name": (
        "a.txt.gz.gz",
        write(gzip.compress(gzip.compress(b"a"))),
        "{} is compressed twice: decompress",
    ),
    "gz without its suffix": (
        "a.jsonl",
        write(gzip.compress(GOOD.encode())),
        "{} is compressed, and its name does not say so: end it with .gz.",
    ),
    "bz2 without its suffix": (
        "a.txt",
        write(bz2.compress(b"text")),
        "{} is compressed, and its name does not say so:",
    ),
    "xz without its suffix": (
        "a.csv",
        write(lzma.compress(b"text")),
        "{} is compressed, and its name does not say so:",
    ),
    "zip": ("a.zip", write_zip, "{} is an archive of files: unpack it, and pass the folder."),
    "zip named text": ("a.txt", write_zip, "{} is a zip archive or a document of an office program. Unpack it, or"),
    "tar": ("a.tar.gz", write(gzip.compress(b"a" * 999)), "{} is an archive of files: unpack it, and pass the folder."),
    "tar of images": ("a.tar", write_tar("a.png"), "{}:a has no tokens, which are read from NAME.input_ids.npy, NAME."),
    "text named tar": ("a.tar", write(b"plain text" * 99), "{} cannot be read as a tar archive: "),
    "empty tar": ("a.tar", write(b""), "{} cannot be read as a tar archive: "),
    "tar of no name": ("a.tar", write_tar("README"), "{} has no record of webdataset."),
    "tar of no array": ("a.tar", write_tar("a.npy"), "{}:a cannot be read: "),
    "index of no shard": ("d", write_index({"shards": []}), "{}/index.json lists no shard."),
    "index of another version": (
        "d",
        write_index({"shards": [{"format": "mds", "version": 1}]}),
        "{}/index.json lists shards of the format 'mds', version 1, and bigbatch reads 'mds', version 2.",
    ),
    "index without its shard": (
        "d",
        write_index(
            {
                "shards": [
                    {
                        "format": "mds",
                        "version": 2,
                        "compression": None,
                        "raw_data": {"basename": "shard.00000.mds", "bytes": 9},
                    }
                ]
            }
        ),
        "{}/index.json lists shard.00000.mds, which does not exist.",
    ),
    "tokens of a word": (
        "a.jsonl",
        write('{"input_ids": ["a"]}'),
        "{}:1: 'input_ids' must be a list of whole numbers.",
    ),
    "negative token": ("a.jsonl", write('{"tokens": [1, -5]}'), "{}:1: 'tokens' has -5, which is no token."),
    "shifted labels": (
        "a.jsonl",
        write('{"input_ids": [1, 2, 3], "labels": [2, 3, -100]}'),
        "{}:1: 'labels' has 2 where the token is 1. A label must be the token itself, not the next one, or -100",
    ),
    "masked tokens": (
        "a.parquet",
        write_parquet(input_ids=[[1, 2]], labels=[[-100, -100]]),
        "{}:1: the record yields no training token: all of its tokens are masked.",
    ),
    "text and tokens": (
        "a.jsonl",
        write('{"text": "a", "input_ids": [1, 2]}'),
        "{}:1: the record has 'text' and 'input_ids', but only one of them is allowed. Keep one, or pass --text-column",
    ),
    "PDF": ("a.txt", write(b"%PDF-1.7\n"), "{} is a PDF document. Extract its text."),
    "pointer of Git LFS": (
        "a.jsonl",
        write(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        "{} is a pointer of Git LFS and not the data. Run git lfs pull.",
    ),
    "Parquet named JSON lines": (
        "a.jsonl",
        write_parquet(text=["a"]),
        "{} is a Parquet file. End its name with .parquet.",
    ),
    "Parquet named text": ("a.txt", write_parquet(text=["a"]), "{} is a Parquet file. End its name with .parquet."),
    "JSON lines named Parquet": ("a.parquet", write(GOOD), "{} cannot be read as a Parquet file: "),
    "JSON lines named Arrow": ("a.arrow", write(GOOD), "{} cannot be read as an Arrow file: "),
    "truncated Parquet": ("a.parquet", write(parquet([{"text": "a"}])[:-9]), "{} cannot be read as a Parquet file: "),
    "truncated Arrow file": (
        "a.arrow",
        write(arrow([{"text": "a"}], pa.ipc.new_file)[:-9]),
        "{} cannot be read as an Arrow file: ",
    ),
    "truncated Arrow stream": (
        "a.arrow",
        write(arrow([{"text": "a"}, {"text": "b" * 99}], pa.ipc.new_stream)[:-99]),
        "{} cannot be read as an Arrow file: ",
    ),
    "JSON lines named text": (
        "a.txt",
        write(GOOD * 3),
        "{} looks like JSON lines and not like text. Rename it to end with .jsonl.",
    ),
    "one JSON line named text": ("a.txt", write(GOOD), "{} looks like JSON lines and not like text."),
    "JSON lines of no suffix": ("corpus", write(GOOD * 3), "{} looks like JSON lines and not like text."),
    "unknown JSON lines named text": ("a.log", write('{"a": 1}\n{"a": 2}\n'), "{} looks like JSON lines and not like"),
    "JSON list named text": (
        "a.txt.gz",
        write(gzip.compress(json.dumps([{"text": "a"}]).encode())),
        "{} looks like a JSON list of records and not like text. Rename it to end with .json.",
    ),
    "table named text": (
        "a.txt",
        write("id,prompt,completion\n1,a,b\n"),
        "{} looks like a table and not like text. Rename it to end with .csv or .tsv.",
    ),
    "latin-1 text": (
        "a.txt",
        write(CAFE),
        "{} is not UTF-8: byte 0xe9 at offset 3. Convert it to UTF-8, or remove it.",
    ),
    "latin-1 at the end": (
        "a.txt",
        write(b"caf\xc3"),
        "{} is not UTF-8: byte 0xc3 at offset 3. Convert it to UTF-8, or",
    ),
    "latin-1 JSON line": (
        "a.jsonl",
        write(b'{"text": "' + CAFE[:4] + b'"}'),
        "{}:1 is not UTF-8: byte 0xe9 at offset 13.",
    ),
    "latin-1 JSON list": (
        "a.json",
        write(b'[{"text": "' + CAFE[:4] + b'"}]'),
        "{} is not UTF-8: byte 0xe9. Convert it",
    ),
    "latin-1 row": (
        "a.csv",
        write(b"text\ncaf\xe9\n"),
        "{}:2 is not UTF-8: byte 0xe9. Convert it to UTF-8, or remove it.",
    ),
    "UTF-16 text": (
        "a.txt",
        write("text".encode("utf-16")),
        "{} is UTF-16: convert it to UTF-8, as with iconv -f UTF-16 -t UTF-8.",
    ),
    "UTF-16 table": ("a.tsv", write("text\ta\nb\tc".encode("utf-16")), "{} is UTF-16: convert it to UTF-8, as with"),
    "UTF-16 without a mark": (
        "a.txt",
        write("text".encode("utf-16-le")),
        "{} has a NUL byte at offset 1 and is not text.",
    ),
    "UTF-32 text": (
        "a.txt",
        write("text".encode("utf-32")),
        "{} is UTF-32: convert it to UTF-8, as with iconv -f UTF-32",
    ),
    "NUL in text": ("a.txt", write("é\0b"), "{} has a NUL byte at offset 2 and is not text. Remove it."),
    "NUL in a row": ("a.csv", write("text\na\0b\n"), "{}:2: the row has a NUL byte, which is not text. Remove it."),
    "NUL in a JSON line": (
        "a.jsonl",
        write('{"text": "a\0"}'),
        "{}:1: not valid JSON: Invalid control character at column",
    ),
    "deep JSON line": ("a.jsonl", write("[" * 100_000), "{}:1: JSON that Python cannot read: maximum recursion depth"),
    "deep JSON": (
        "a.json",
        write("[" * 100_000),
        "{}:1: JSON that Python cannot read: maximum recursion depth exceeded",
    ),
    "deep JSON object": (
        "a.json",
        write('{"a":' * 100_000),
        "{}: JSON that Python cannot read: maximum recursion depth",
    ),
    "huge number": ("a.jsonl", write("1" * 5000), "{}:1: JSON that Python cannot read: Exceeds the limit"),
    "key twice": (
        "a.jsonl",
        write('{"text": "a", "text": "b"}'),
        "{}:1: not valid JSON: the key 'text' occurs twice in one object.",
    ),
    "key twice in a list": (
        "a.json",
        write('[{"text": "a", "text": "b"}]'),
        "{}:1: not valid JSON: the key 'text' occurs",
    ),
    "JSON cut off": (
        "a.json",
        write('[{"text": "a"}, {"text": "b'),
        "{}:2: not valid JSON: Unterminated string starting",
    ),
    "JSON list cut off": ("a.json", write('[{"text": "a"},'), "{}:2: not valid JSON: Expecting value."),
    "JSON without a bracket": (
        "a.json",
        write('[{"text": "a"}'),
        "{}, after record 1: not valid JSON: the end instead of",
    ),
    "JSON with more": (
        "a.json",
        write('[{"text": "a"}] 1'),
        "{} has more after its list of records. Save it as JSON lines",
    ),
    "JSON of one number": ("a.json", write("7"), "{} is not JSON of records: it starts with '7', and not with the ["),
    "JSON of numbers": ("a.json", write("[1, 2]"), "{}:1: it is a number. A record must have 'text', or 'prompt' and"),
    "JSON of settings": (
        "a.json",
        write('{"name": "a", "sizes": [1, 2]}'),
        "{} is one JSON object with 'name', 'sizes', which is no record and has no list of any.",
    ),
    "JSON of two lists": (
        "a.json",
        write('{"train": [{"text": "a"}], "test": [{"text": "b"}]}'),
        "{} has several lists of records, 'train', 'test': save the one to train on as a file of its own.",
    ),
    "JSON of other records": (
        "a.json",
        write('[{"id": 1}, {"id": 2}]'),
        "{}:1: the record has 'id'. A record must have",
    ),
    "other columns of CSV": (
        "a.csv",
        write("id,body\n1,a\n"),
        "{} has the columns 'id', 'body', none of which can be trained on. A record must have 'text'",
    ),
    "CSV with one column": ("a.csv", write("body\na\n"), "{} has the columns 'body', none of which can be trained on."),
    "CSV without a header": (
        "a.csv",
        write("some words\nmore\n"),
        "{} has the columns 'some words', none of which can be",
    ),
    "column twice": ("a.csv", write("text,text\na,b\n"), "{} has the column 'text' twice. Rename one of them."),
    "short row": (
        "a.csv",
        write("prompt,completion\na,b\nc\n"),
        "{}:3: the row has 1 cell, and the first row 2 cells. Put text with delimiters in double quotes.",
    ),
    "long row": ("a.tsv", write("text\na\tb\n"), "{}:2: the row has 2 cells, and the first row 1 cell. Put text with"),
    "stray quote": ("a.csv", write('text\n"a"b\n'), "{}:2: not valid CSV: ',' expected after '\"'."),
    "open quote": ("a.csv", write('text\n"a\nb\n'), "{}:2: not valid CSV: unexpected end of data."),
    "other columns of Parquet": (
        "a.parquet",
        write_parquet(body=["a"]),
        "{} has the columns 'body', none of which can be",
    ),
    "null column": ("a.parquet", write_parquet(text=pa.nulls(2)), "{}:1: the record has no field. A record must have"),
    "numbers in Parquet": (
        "a.parquet",
        write_parquet(text=[1]),
        "{}:1: the field 'text' is a number and must be a string.",
    ),
    "latin-1 in Parquet": (
        "a.parquet",
        write_parquet(text=pa.array([b"caf\xe9"], pa.binary()).view(pa.string())),
        "{}:1: text is not UTF-8: ",
    ),
    "unreadable file": ("a.txt", lambda path: path.symlink_to(path), "there is no file or folder"),
    "pipe": ("a.jsonl", lambda path: os.mkfifo(path), "{} is a pipe, but --data needs a regular file or a folder."),
    "link to itself in a folder": (
        "d",
        lambda path: (path.mkdir(), (path / "a.txt").symlink_to("a.txt")),
        "cannot read {}/a",
    ),
    "loop of folders": (
        "d",
        lambda path: (path.mkdir(), (path / "up").symlink_to(path)),
        "{}/up is a link to a folder. Pass the folder itself, or remove the link.",
    ),
    "empty folder": ("d", lambda path: path.mkdir(), "the folder {} contains no file to train on."),
    "folder of a pipe": (
        "d",
        lambda path: (path.mkdir(), os.mkfifo(path / "p")),
        "the folder {} contains no file to train on: {}/p is a pipe and is left out.",
    ),
    "pattern without files": (
        "*.nothing",
        lambda path: None,
        "no file matches the pattern '{}'. Its folders must exist, and *",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_input_is_one_sentence(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    name, build, message = HOSTILE[case]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    build(path)
    with pytest.raises(InputError) as caught:
        read(path)
    found = str(caught.value)
    assert found.startswith(message.replace("{}", str(path)))
    assert "\n" not in found
    assert main(["train", "--data", str(path), "--out", "run"]) == 2
    assert f"bigbatch train: {found}\n" in capfd.readouterr().err.replace("\n\n", "\n")
    assert not (tmp_path / "run").exists()


def test_unreadable_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("bigbatch.lm.data.compression._open", refuse)  # root may read every file
    with pytest.raises(InputError, match=r"^cannot read .*a\.txt: permission denied\.$"):
        read(tmp_path)
    (tmp_path / "b.jsonl").write_text(GOOD)
    with pytest.raises(InputError, match="permission denied"):
        read(tmp_path, skip_broken=True)  # nothing is left


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_broken_records_are_skipped_and_counted(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    contents = {
        ".jsonl": GOOD.encode()
        + b'\n{"text": 5}\n{"text": "caf\xe9"}\n{"text": "a", "text": "b"}\n{\n'
        + GOOD.encode(),
        ".json": b'[{"text": "good"}, 5, null, {"text": "a", "text": "b"}, {"id": 1}, {"text": "good"}]',
        ".csv": b'text,id\ngood,1\ncaf\xe9,2\nshort\n"a"b,3\nN\0,4\n\ngood,5\n',
        ".parquet": parquet([{"text": text} for text in ("good", "", None, " ", "\n", "good")]),
    }
    path.write_bytes(contents[suffix])
    corpus = read(path, skip_broken=True)
    assert [document.text for document in corpus] == ["good", "good"]
    assert corpus.notes[0] == f"2 records in 1 file from {path}"
    assert corpus.left_out[0].startswith(f"4 broken records left out; the first: {path}:")
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value).endswith(SKIP_ADVICE)
    assert corpus.left_out[0].endswith(str(caught.value).removesuffix(f" {SKIP_ADVICE}"))


def test_broken_files_are_skipped_and_counted(tmp_path: Path) -> None:
    for number, (name, build, _) in enumerate(HOSTILE.values()):
        path = tmp_path / f"{number:02}" / name
        if path.suffix and "*" not in name and name not in ("d", "a.tar.gz"):
            path.parent.mkdir()
            build(path)
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() * 2 + RANDOM)[:-200])
    (tmp_path / "d").symlink_to(tmp_path)
    corpus = read(tmp_path, skip_broken=True)
    names = {Path(document.source.partition(":")[0]).name for document in corpus}
    assert {"good.txt", "half.jsonl.gz"} < names
    files = [path for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()]
    left_out = " ".join(corpus.left_out)
    assert "broken records and " in left_out
    assert "is a pipe and is left out" in left_out
    assert len(corpus.files) <= len(files)


def test_one_misencoded_file_ends_no_folder_run(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(CAFE)
    corpus = read(tmp_path, skip_broken=True)
    assert [document.text for document in corpus] == ["good"]
    assert corpus.left_out == (
        f"1 broken file left out; the first: {tmp_path}/b.txt is not UTF-8: byte 0xe9 at offset 3. Convert it to "
        "UTF-8, or remove it.",
    )


def test_huge_line_is_counted(tmp_path: Path) -> None:
    line = b'{"text": "' + b"a" * LARGEST_RECORD + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes(GOOD.encode() + line + GOOD.encode())
    corpus = read(tmp_path, skip_broken=True)
    assert [document.source.rpartition(":")[2] for document in corpus] == ["1", "3"]
    assert "the record has more than 64 MiB. Cut it into several." in corpus.left_out[0]


def test_huge_json_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"data": [\n' + b" " * LARGEST_RECORD + b"]}")
    with pytest.raises(InputError, match=r"a\.json is one JSON object and has more than 64 MiB\. Save its records"):
        read(tmp_path / "a.json")


def test_records_of_list_may_cross_chunks(tmp_path: Path) -> None:
    records = [{"text": "x" * size} for size in (1, 2**20 - 30, 3, 2**21, 2**20, 5)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert texts(tmp_path / "a.json") == [record["text"] for record in records]


def test_large_text_is_several_documents(tmp_path: Path) -> None:
    line = "Füße, 你好, 007 " * 20 + "\r\n"
    text = line * (2**23 // len(line.encode())) + "x" * 600_000 + "\n" + "end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    corpus = read(tmp_path / "a.txt")
    documents = corpus.documents
    assert "".join(document.text or "" for document in documents) == text
    assert len(documents) > 20
    assert all(len(document.text or "") <= 2**18 for document in documents)
    assert documents[0].source == f"{tmp_path}/a.txt:1"
    second = (documents[0].text or "").count("\n") + 1
    assert documents[1].source == f"{tmp_path}/a.txt:{second}"
    assert f"is large and read as {len(documents)} documents, cut at line ends" in corpus.notes[0]
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert [document.key for document in read(tmp_path / "b.txt.gz")] == [document.key for document in documents]


def test_text_up_to_limit_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a b\n" * (2**23 // 4))
    assert len(texts(tmp_path / "a.txt")) == 1


def test_blank_pieces_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" + b"\n" * 2**23)
    corpus = read(tmp_path / "a.txt")
    assert len(corpus.documents) == 1
    assert corpus.left_out[0] == f"32 pieces of {tmp_path}/a.txt with only white space left out"
    (tmp_path / "a.txt").write_bytes(b"\n" * (2**23 + 1))
    with pytest.raises(InputError, match="contains only white space"):
        read(tmp_path / "a.txt")


def test_settings_in_folder_of_code_are_left_out(tmp_path: Path) -> None:
    for name in ("package.json", "src/a.json", "list.json", "table.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[1]" if name == "list.json" else '{"name": "a"}')
    (tmp_path / "src/main.js").write_text("{ let a = 1 }")
    (tmp_path / "records.json").write_text('[{"text": "a record"}]')
    corpus = read(tmp_path)
    assert {document.text for document in corpus} == {"{ let a = 1 }", "a record"}
    assert corpus.left_out == (
        f"4 files of data without records left out: {tmp_path}/list.json, {tmp_path}/package.json, "
        f"{tmp_path}/src/a.json, {tmp_path}/table.csv",
    )


def test_null_columns_of_table_are_missing(tmp_path: Path) -> None:
    rows = [record | {"id": None} for records in SHAPES.values() for record in records]
    names = {name for row in rows for name in row}
    pq.write_table(
        pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), tmp_path / "a.parquet"
    )
    expected = [to_document(record, "x").key for record in rows]
    assert [document.key for document in read(tmp_path / "a.parquet")] == expected


def test_limit_of_csv_module_is_kept(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"text\n{'a' * 1_000_000}\n")
    assert len(texts(tmp_path / "a.csv")[0] or "") == 1_000_000
    assert csv.field_size_limit() == before
