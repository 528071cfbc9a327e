"""Shards of other tools give the tokens that were written, wherever they are; damage is one sentence."""

import io
import json
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from bigbatch.errors import InputError
from bigbatch.lm.data.corpus import Corpus
from bigbatch.lm.data.records import to_document
from bigbatch.lm.data.sources import ReadOptions, check_data_path, open_sources
from bigbatch.lm.data.token_records import token_ids
from bigbatch.lm.data.token_shards.index import read_index, write_index
from bigbatch.lm.data.token_shards.reader import ShardTokens

ROWS = [[7, 3, 9, 200, 5], [4, 8], [299, 0, 1, 2, 3, 4, 5, 6]]
LABELS = [[-100, -100, 9, 200, -100], [-100, 8], [-100, 0, 1, 2, 3, 4, 5, 6]]


def corpus_of(data: Path | str, **options: Any) -> Corpus:
    (corpus,) = open_sources([str(data)], options=ReadOptions(**options)).training
    return corpus


def tokens_of(corpus: Corpus) -> list[list[int]]:
    return [token_ids(document).tolist() for document in corpus]


def marks_of(corpus: Corpus) -> list[bytes | None]:
    return [document.trained for document in corpus]


# MosaicML Streaming -----------------------------------------------------------------------------------------------

ZIP = Path(__file__).with_name("mosaic.zip")
"""Files that mosaicml-streaming 0.13.0 wrote with MDSWriter: the same eight rows with each setting, and ten others."""
WRITTEN = np.random.default_rng(0)
DOCUMENTS = [WRITTEN.integers(3, 290, size=size).tolist() for size in (5, 9, 2, 17, 30, 4, 8, 3)]
COMPRESSED = ("zstd", "gz", "bz2", "snappy", "br")


@pytest.fixture
def mosaic(tmp_path: Path) -> Path:
    with zipfile.ZipFile(ZIP) as archive:
        archive.extractall(tmp_path / "mosaic")
    return tmp_path / "mosaic"


@pytest.mark.parametrize("kind", ["plain", "labels", "bytes", *COMPRESSED])
def test_shards_of_library_hold_their_rows(mosaic: Path, kind: str) -> None:
    corpus = corpus_of(mosaic / kind)
    assert tokens_of(corpus) == DOCUMENTS
    halves = [bytes(len(row) // 2) + b"\1" * (len(row) - len(row) // 2) for row in DOCUMENTS]
    expected = [None if all(half[1:]) else half for half in halves]
    assert marks_of(corpus) == (expected if kind == "labels" else [None] * 8)
    assert (corpus.shards is None) == (kind in COMPRESSED)
    shards = len(list((mosaic / kind).glob("shard*")))
    assert corpus.notes == (f"8 records of tokens in {shards} shards from {mosaic / kind}",)


def test_rows_of_fixed_size_are_read(mosaic: Path) -> None:
    assert tokens_of(corpus_of(mosaic / "fixed")) == [list(range(i, i + 6)) for i in range(10)]


def test_splits_are_folders(mosaic: Path) -> None:
    (mosaic / "all").mkdir()
    for source, split in (("plain", "train"), ("labels", "val"), ("fixed", "test")):
        (mosaic / source).rename(mosaic / "all" / split)
    found = open_sources([str(mosaic / "all")])
    assert tokens_of(found.training[0]) == DOCUMENTS
    assert tokens_of(found.validation[0]) == DOCUMENTS
    assert found.training[0].left_out == (f"{mosaic}/all has other splits, which are not used: test",)
    assert len(tokens_of(corpus_of(mosaic / "all", split="test"))) == 10


def change(path: Path, edit: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edited(**entries: Any) -> Callable[[Path], object]:
    return lambda folder: change(folder / "index.json", lambda content: content["shards"][0].update(entries))


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "other version": ("plain", edited(version=3), "/index.json lists shards of the format 'mds', version 3, and"),
    "other format": ("plain", edited(format="csv"), "/index.json lists shards of the format 'csv', version 2, and"),
    "unknown compression": (
        "plain",
        edited(compression="lzw:3"),
        "/index.json lists shards with the compression 'lzw'",
    ),
    "other columns": (
        "plain",
        edited(column_names=["text"]),
        "/index.json lists the columns 'text', and tokens are read",
    ),
    "strings": (
        "plain",
        edited(column_encodings=["str"]),
        "/shard.00000.mds:1: the column 'input_ids' has the encoding",
    ),
    "wrong dtype": ("plain", edited(column_encodings=["ndarray:int64"]), "/shard.00000.mds:1 is damaged: its column"),
    "unknown dtype": ("plain", edited(column_encodings=["ndarray:odd"]), "/shard.00000.mds:1 is damaged: its column"),
    "missing key": (
        "plain",
        lambda folder: change(folder / "index.json", lambda content: content["shards"][0].pop("samples")),
        "/index.json cannot be read as the index of MosaicML Streaming ('samples').",
    ),
    "no shard": (
        "plain",
        lambda folder: change(folder / "index.json", lambda content: content["shards"].clear()),
        "/index.json lists no shard.",
    ),
    "missing file": (
        "plain",
        lambda folder: (folder / "shard.00001.mds").unlink(),
        "/index.json lists shard.00001.mds, which does not exist.",
    ),
    "other samples": (
        "plain",
        edited(samples=1),
        "/shard.00000.mds is damaged: it has 4 samples, and index.json says 1.",
    ),
    "cut in a sample": ("plain", cut("shard.00000.mds", 250), "/shard.00000.mds is damaged: it ends within sample"),
    "cut in the table": ("plain", cut("shard.00000.mds", 13), "/shard.00000.mds is damaged: its table of samples is."),
    "empty shard": (
        "plain",
        cut("shard.00000.mds", 0),
        "/shard.00000.mds is damaged: it has 0 samples, and index.json",
    ),
    **{
        f"cut {kind}": (kind, cut(f"shard.00000.mds.{kind}", 60), f"/shard.00000.mds.{kind} is damaged: ")
        for kind in COMPRESSED
    },
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_mosaic_shards_are_one_sentence(case: str, mosaic: Path) -> None:
    kind, damage, message = DAMAGE[case]
    damage(mosaic / kind)
    with pytest.raises(InputError) as caught:
        tokens_of(corpus_of(mosaic / kind))
    assert str(caught.value).startswith(f"{mosaic / kind}{message}")
    assert "\n" not in str(caught.value)


def test_damaged_shard_is_skipped_and_counted(mosaic: Path) -> None:
    cut("shard.00000.mds", 250)(mosaic / "plain")
    corpus = corpus_of(mosaic / "plain", skip_broken=True)
    kept = tokens_of(corpus)
    assert kept == [row for row in DOCUMENTS if row in kept]
    assert 0 < len(kept) < 8
    assert corpus.left_out[0].startswith("1 broken file left out; the first: ")


def test_folder_with_other_index_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('[{"text": "a page"}]')
    assert [document.text for document in corpus_of(tmp_path)] == ["a page"]


# webdataset -------------------------------------------------------------------------------------------------------


def npy(values: list[int], dtype: str = "int32") -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.array(values, dtype))
    return sink.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def columns(rows: list[list[int]] = ROWS, *, first: int = 0, labels: bool = False) -> dict[str, bytes]:
    files = {}
    for i, row in enumerate(rows):
        files[f"{first + i:06}.input_ids.npy"] = npy(row)
        if labels:
            files[f"{first + i:06}.labels.npy"] = npy(LABELS[i], "int64")
        files[f"{first + i:06}.url.txt"] = b"https://example.org"
    return files


TARS: dict[str, dict[str, bytes]] = {
    "columns": columns(),
    "names": {f"{i}.tokens.npy": npy(row, "uint16") for i, row in enumerate(ROWS)},
    "plain": {f"a/b/{i}.npy": npy(row, "int64") for i, row in enumerate(ROWS)},
    "json": {f"{i}.json": json.dumps({"input_ids": row, "id": i}).encode() for i, row in enumerate(ROWS)},
    "column of json": {f"{i}.INPUT_IDS.json": json.dumps(row).encode() for i, row in enumerate(ROWS)},
    "long names": {f"{'x' * 150}/{i}.npy": npy(row) for i, row in enumerate(ROWS)},
    "pickles": {f"{i}.{k}": v for i, row in enumerate(ROWS) for k, v in (("npy", npy(row)), ("pyd", b"\x80not"))},
}


@pytest.mark.parametrize("kind", TARS)
def test_records_of_archive_are_read(kind: str, tmp_path: Path) -> None:
    corpus = corpus_of(write_tar(tmp_path / "a.tar", TARS[kind]))
    assert tokens_of(corpus) == ROWS
    assert corpus.shards is not None
    assert corpus.notes == (f"3 records of tokens in 1 shard from {tmp_path}/a.tar",)


def test_writer_of_library_is_read(tmp_path: Path) -> None:

    with webdataset.ShardWriter(str(tmp_path / "part-%06d.tar"), maxcount=2, verbose=0) as sink:
        for i, (row, labels) in enumerate(zip(ROWS, LABELS, strict=True)):
            sink.write({"__key__": f"{i}", "input_ids.npy": np.array(row), "labels.npy": np.array(labels)})
    for data in (tmp_path, tmp_path / "part-{000000..000001}.tar", tmp_path / "part-*.tar"):
        corpus = corpus_of(data)
        assert tokens_of(corpus) == ROWS
        assert marks_of(corpus) == [b"\0\0\1\1\0", None, None]
        assert corpus.notes[0] == f"3 records of tokens in 2 shards from {data}"


def test_archives_of_splits_are_selected(tmp_path: Path) -> None:
    for name, row in (("train-000", 0), ("train-001", 1), ("val-000", 2), ("test-000", 2)):
        write_tar(tmp_path / f"{name}.tar", columns([ROWS[row]]))
    found = open_sources([str(tmp_path)])
    assert tokens_of(found.training[0]) == ROWS[:2]
    assert tokens_of(found.validation[0]) == ROWS[2:]
    assert found.training[0].left_out == (f"{tmp_path} has other splits, which are not used: test",)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a.jpg": b"x", "a.txt": b"cat"},
            "a.tar:a has no tokens, which are read from NAME.input_ids.npy, NAME.tokens.npy",
        ),
        ({}, "a.tar has no record of webdataset."),
        ({"noname": b"x"}, "a.tar has no record of webdataset."),
        ({"a.npy": b"x"}, "a.tar:a cannot be read: "),
        ({"a.npy": npy([1.5, 2], "float32")}, "a.tar:a: 'input_ids' must be a list of whole numbers."),
        ({"a.json": b"{"}, "a.tar:a cannot be read: "),
        ({"a.npy": npy([1, 2]), "a.input_ids.json": b"[1]"}, "a.tar:a has 'input_ids' twice."),
    ],
)
def test_other_archive_is_one_sentence(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        tokens_of(corpus_of(write_tar(tmp_path / "a.tar", files)))
    assert str(caught.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(caught.value)


def test_truncated_archive_is_one_sentence(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", columns())
    path.write_bytes(path.read_bytes()[:2700])
    with pytest.raises(InputError, match=r"^\S*a\.tar (cannot be read as a tar archive: |ends within the record )"):
        tokens_of(corpus_of(path))
    assert tokens_of(corpus_of(path, skip_broken=True)) == ROWS[:1]


# places -----------------------------------------------------------------------------------------------------------


class BlockFile(AbstractBufferedFile):
    """A file that is read in blocks, and that has no ``readline(size)``."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return bytes(self.fs.cat_file(self.path, start, end))


@pytest.fixture
def remote(mosaic: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a storage that is not on this machine's disk, with shards; its files are those of s3fs, gcsfs and HTTP."""
    fs = fsspec.filesystem("memory")
    opened = MemoryFileSystem._open

    def in_blocks(self: MemoryFileSystem, path: str, mode: str = "rb", **options: Any) -> Any:
        return (
            BlockFile(self, path, mode, size=self.size(path)) if mode == "rb" else opened(self, path, mode, **options)
        )

    monkeypatch.setattr(MemoryFileSystem, "_open", in_blocks)
    fs.store.clear()
    for kind in ("plain", "labels", "zstd"):
        fs.put(str(mosaic / kind), f"/bucket/{kind}", recursive=True)
    fs.pipe("/bucket/tars/a-0.tar", write_tar(mosaic / "a.tar", columns(ROWS[:1])).read_bytes())
    fs.pipe("/bucket/tars/a-1.tar", write_tar(mosaic / "a.tar", columns(ROWS[1:])).read_bytes())
    sink = io.BytesIO()
    pq.write_table(pa.table({"input_ids": ROWS, "labels": LABELS}), sink)
    fs.pipe("/bucket/rows/a.parquet", sink.getvalue())
    fs.pipe("/bucket/rows/a.jsonl", b"".join(json.dumps({"tokens": row}).encode() + b"\n" for row in ROWS))
    return "memory://bucket"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", DOCUMENTS),
        ("plain/", DOCUMENTS),
        ("labels", DOCUMENTS),
        ("zstd", DOCUMENTS),
        ("tars", ROWS),
        ("tars/a-{0..1}.tar", ROWS),
        ("tars/*.tar", ROWS),
        ("tars/a-0.tar", ROWS[:1]),
        ("rows/a.parquet", ROWS),
        ("rows/*.jsonl", ROWS),
    ],
)
def test_remote_data_is_read(remote: str, name: str, expected: list[list[int]]) -> None:
    corpus = corpus_of(f"{remote}/{name}")
    assert tokens_of(corpus) == expected
    assert tokens_of(corpus) == expected  # again
    assert not corpus.files


class RangeHandler(SimpleHTTPRequestHandler):
    """Serves parts of files, which that of the standard library does not."""

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(mosaic: Path) -> Iterator[Callable[[type[SimpleHTTPRequestHandler]], str]]:
    servers = []

    def serve(handler: type[SimpleHTTPRequestHandler]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(mosaic)))
        Thread(target=server.serve_forever).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_shards_of_web_server_are_read(web: Callable[..., str], mosaic: Path, tmp_path: Path) -> None:
    write_tar(mosaic / "a-0.tar", columns())
    url = web(RangeHandler)
    assert tokens_of(corpus_of(f"{url}/zstd")) == DOCUMENTS
    assert tokens_of(corpus_of(f"{url}/a-{{0..0}}.tar")) == ROWS
    reader = reader_of(f"{url}/plain", tmp_path / "index")
    spans = reader.read_many([(0, 5), (5, 14), (20, 30)])
    tokens = [token for row in DOCUMENTS for token in row]
    assert [span.tokens.tolist() for span in spans] == [tokens[0:5], tokens[5:14], tokens[20:30]]


def test_server_without_parts_of_files_is_refused(web: Callable[..., str], tmp_path: Path) -> None:
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    reader = reader_of(f"{web(Handler)}/plain", tmp_path / "index")
    with pytest.raises(InputError, match=r"or the storage does not send parts of files\.$"):
        reader.read(0, 1)


def test_file_url_is_its_path(mosaic: Path) -> None:
    assert tokens_of(corpus_of(f"file://{mosaic}/plain")) == DOCUMENTS
    (mosaic / "a.txt").write_text("a text")
    assert [document.text for document in corpus_of(f"file://{mosaic}/a.txt")] == ["a text"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "s3://b/a",
            "s3://b/a cannot be read without the library s3fs. Install it: pip install 'bigbatch[streaming]'.",
        ),
        (
            "gs://b/a",
            "gs://b/a cannot be read without the library gcsfs. Install it: pip install 'bigbatch[streaming]'.",
        ),
        ("abfs://b/a", "abfs://b/a cannot be read without the library adlfs. Install it: pip install adlfs."),
        ("odd://b/a", "odd://b/a: no protocol is named 'odd'. Pass a path, or a URL of s3://, gs:// or https://."),
    ],
)
def test_missing_library_of_protocol_is_named(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigbatch.lm.data.token_shards.storage.find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        check_data_path(url)
    assert str(caught.value) == message


def test_missing_webdataset_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", columns())
    monkeypatch.setitem(__import__("sys").modules, "webdataset.autodecode", None)
    with pytest.raises(InputError) as caught:
        corpus_of(path)
    assert str(caught.value) == (
        f"{path} cannot be read without the library webdataset. Install it: pip install 'bigbatch[webdataset]'. If it "
        "is an archive of files, unpack it and pass the folder."
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nothing",
            "memory://bucket/nothing has nothing. A URL must have shards of MosaicML Streaming (index.json) or",
        ),
        ("rows", "memory://bucket/rows has 2 other files. A URL must have shards"),
        ("a.parquet", "no file matches 'memory://bucket/a.parquet'."),
        ("a-{0..1}.tar", "memory://bucket/a-0.tar does not exist."),
    ],
)
def test_missing_remote_data_is_one_sentence(remote: str, name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        corpus_of(f"{remote}/{name}")
    assert str(caught.value).startswith(message)


# index and reader -------------------------------------------------------------------------------------------------


def reader_of(data: Path | str, folder: Path) -> ShardTokens:
    folder.mkdir()
    shards = corpus_of(data).shards
    assert shards is not None
    write_index(folder, shards, skip_broken=False)
    return ShardTokens(shards, read_index(folder))


@pytest.mark.parametrize("kind", ["plain", "labels", "tars"])
def test_any_tokens_are_read_in_place(remote: str, mosaic: Path, kind: str, tmp_path: Path) -> None:
    corpus = corpus_of(f"{remote}/{kind}")
    reader = reader_of(f"{remote}/{kind}", tmp_path / "index")
    tokens = np.concatenate([token_ids(document) for document in corpus])
    trained = np.concatenate(
        [np.frombuffer(document.trained or b"\0" + b"\1" * (document.size // 4 - 1), np.bool_) for document in corpus]
    )
    assert reader.num_tokens == len(tokens)
    bounds = [(start, stop) for start in range(len(tokens)) for stop in range(start, len(tokens) + 1)]
    for (start, stop), span in zip(bounds, reader.read_many(bounds), strict=True):
        assert span.tokens.tolist() == tokens[start:stop].tolist()
        assert span.trained.tolist() == trained[start:stop].tolist()
        assert reader.marks(start, stop).tolist() == trained[start:stop].tolist()
    rows = list(reader.rows())
    assert np.concatenate([part.counts for part in rows]).tolist() == [document.size // 4 for document in corpus]
    keys = [int(document.key[:16], 16) for document in corpus]
    assert np.concatenate([part.keys for part in rows]).tolist() == keys


def test_changed_record_is_refused(mosaic: Path, tmp_path: Path) -> None:
    reader = reader_of(mosaic / "plain", tmp_path / "index")
    path = mosaic / "plain" / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    data[-1:] = b"\1"
    path.write_bytes(data)
    with pytest.raises(
        InputError, match=r"is not what it was when the shards were indexed: .*shard\.00000\.mds was cha"
    ):
        reader.read(0, reader.num_tokens)


def test_damaged_index_is_refused(mosaic: Path, tmp_path: Path) -> None:
    reader_of(mosaic / "plain", tmp_path / "index")
    (tmp_path / "index" / "end").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"^the index in .* is damaged \(end has 0 bytes, not 64\)\. Delete the folder"
    ):
        read_index(tmp_path / "index")


# records of tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["input_ids", "tokens"])
def test_record_of_tokens_is_a_document(name: str) -> None:
    document = to_document({name: ROWS[0], "id": 3}, "a:1")
    assert token_ids(document).tolist() == ROWS[0]
    assert document.trained is None
    assert to_document({name: ROWS[0], "labels": ROWS[0]}, "b:2").key == document.key


@pytest.mark.parametrize(
    ("columns", "tokens", "trained"),
    [
        ({"labels": LABELS[0]}, ROWS[0], [0, 0, 1, 1, 0]),
        ({"completion_mask": [0, 0, 0, 1, 1]}, ROWS[0], [0, 0, 0, 1, 1]),
        ({"assistant_masks": [1, 0, 0, 0, 1]}, ROWS[0], [0, 0, 0, 0, 1]),
        ({"attention_mask": [0, 1, 1, 1, 0]}, ROWS[0][1:4], None),
        ({"attention_mask": [1, 1, 1, 0, 0], "labels": LABELS[0]}, ROWS[0][:3], [0, 0, 1]),
    ],
)
def test_masks_of_record_select_tokens(columns: dict[str, Any], tokens: list[int], trained: list[int] | None) -> None:
    document = to_document({"input_ids": ROWS[0], **columns}, "a:1")
    assert token_ids(document).tolist() == tokens
    assert (document.trained and list(document.trained)) == trained


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": "1 2 3"}, "'input_ids' must be a list of whole numbers."),
    ({"input_ids": [1, 2.5]}, "'input_ids' must be a list of whole numbers."),
    ({"input_ids": [[1], [2]]}, "'input_ids' must be a list of whole numbers."),
    ({"input_ids": [[1], [2, 3]]}, "'input_ids' must be a list of whole numbers."),
    ({"input_ids": [True, False]}, "'input_ids' must be a list of whole numbers."),
    ({"input_ids": [1, None]}, "'input_ids' must be a list of whole numbers."),
    ({"input_ids": [1, -1]}, "'input_ids' has -1, which is no token."),
    ({"input_ids": [1, 2**31]}, "'input_ids' has 2147483648, which is no token."),
    ({"input_ids": [2**70, 1]}, "'input_ids' must be a list of whole numbers."),
    ({"input_ids": []}, "the record yields no training token: it has fewer than 2 tokens."),
    ({"input_ids": [5]}, "the record yields no training token: it has fewer than 2 tokens."),
    (
        {"input_ids": [5, 6], "labels": [-100, -100]},
        "the record yields no training token: all of its tokens are masked.",
    ),
    ({"input_ids": [5, 6], "labels": [5, -100]}, "the record yields no training token: all of its tokens are masked."),
    ({"input_ids": [5, 6], "labels": [6]}, "'labels' has 1 entries, and 'input_ids' has 2."),
    (
        {"input_ids": [5, 6, 7], "labels": [6, 7, -100]},
        "'labels' has 6 where the token is 5. A label must be the token itself, not the next one, or -100 where it is "
        "not trained on.",
    ),
    ({"input_ids": [5, 6], "completion_mask": [0, 2]}, "'completion_mask' has entries other than 0 and 1."),
    ({"input_ids": [5, 6], "attention_mask": [0, 0]}, "the record yields no training token: its 'attention_mask' is 0"),
    ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, "'attention_mask' has a 0 between two tokens, and only"),
    ({"input_ids": b"\0" * 12}, "'input_ids' has 12 bytes, and bytes are read as int64."),
    (
        {"input_ids": [5, 6], "text": "a"},
        "the record has 'text' and 'input_ids', but only one of them is allowed. Keep one, or pass --text-column text.",
    ),
]


@pytest.mark.parametrize(("record", "message"), BROKEN)
def test_broken_record_of_tokens_is_one_sentence(record: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        to_document(record, "a:1")
    assert str(caught.value).startswith(f"a:1: {message}")
    assert "\n" not in str(caught.value)


def test_column_tokens_of_other_kind_is_ignored() -> None:
    for value in (512, ["a", "word"], [], None, "a word"):
        assert to_document({"text": "a word", "tokens": value}, "a:1").text == "a word"


def test_unpacked_folder_of_pages_stays_a_folder(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", columns())
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(InputError, match=r"a\.tar is an archive of files: unpack it, and pass the folder\."):
        tokens_of(corpus_of(tmp_path))
    shutil.move(tmp_path / "b.txt", tmp_path / ".b.txt")
    assert tokens_of(corpus_of(tmp_path)) == ROWS
