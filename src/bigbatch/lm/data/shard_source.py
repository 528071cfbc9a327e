"""Open shards of tokens and remote files as sources.

folder or URL with index.json             MosaicML Streaming; also one folder of them for each split
*.tar, folder of them, a-{000..099}.tar   webdataset
URL of .parquet, .arrow or .jsonl         records, as of local files
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bigbatch.errors import InputError
from bigbatch.lm.data.arrow_files import read_arrow
from bigbatch.lm.data.corpus import Corpus
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.file_source import Source
from bigbatch.lm.data.folder_files import has_wildcard, list_folder
from bigbatch.lm.data.hub_folder import choose_split
from bigbatch.lm.data.json_files import read_json_lines
from bigbatch.lm.data.reading import Reading, ReadOptions
from bigbatch.lm.data.record_files import select_columns, to_documents
from bigbatch.lm.data.records import shape_notes
from bigbatch.lm.data.split_names import SPLITS, split_of_name
from bigbatch.lm.data.token_shards.storage import Storage, StoredFile
from bigbatch.lm.text import plural

INDEX = "index.json"
ARCHIVE = ".tar"
REMOTE_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".ndjson")
_BRACES = re.compile(r"\{\w+\.\.\w+\}")
_LOCAL = "file://"


def local_path(data: str) -> str:
    """Return the path of a ``file://`` URL; any other name as it is."""
    return data.removeprefix(_LOCAL) if data.startswith(_LOCAL + "/") else data


def is_archive_list(data: str) -> bool:
    """Return whether a name is a list of tar archives, as ``a-{000..099}.tar``."""
    return data.endswith(ARCHIVE) and _BRACES.search(data) is not None


def is_mosaic_folder(folder: Path) -> bool:
    """Return whether a folder has the index of MosaicML Streaming."""
    if not (folder / INDEX).is_file():
        return False
    try:
        content = json.loads((folder / INDEX).read_bytes())
    except (OSError, ValueError):
        return False
    shards = content.get("shards") if isinstance(content, dict) else None
    return isinstance(shards, list) and all(isinstance(shard, dict) and "format" in shard for shard in shards)


def open_shard_folder(folder: Path, data: str, options: ReadOptions, *, wanted: str) -> Source | None:
    """Open a local folder of shards as a source; None if it is no such folder.

    Raises:
        InputError: It cannot be read, or it is not clear which of its splits to read.
    """
    if is_mosaic_folder(folder):
        return Source(_mosaic(Storage.of(str(folder)), data, options))
    if not (folder / INDEX).exists():
        names = sorted(path.name for path in folder.iterdir() if path.is_dir() and is_mosaic_folder(path))
        if names:
            return _of_splits(Storage.of(str(folder)), names, data, options, wanted=wanted)
    paths = [path for path in list_folder(folder).files if path.name != INDEX]
    if paths and all(path.name.endswith(ARCHIVE) for path in paths):
        storage, archives = Storage.of(str(folder)), {str(path.absolute()) for path in paths}
        return _tar(storage, [file for file in storage.files() if file.path in archives], data, options, wanted=wanted)
    return None


def open_archives(data: str, options: ReadOptions, *, wanted: str) -> Source:
    """Open local tar archives as a source: a path, a pattern, or a list as ``a-{000..099}.tar``.

    Raises:
        InputError: They cannot be read.
    """
    files = _expanded(data)
    return _tar(Storage.of(str(Path(files[0].path).parent)), files, data, options, wanted=wanted)


def open_url(data: str, options: ReadOptions, *, wanted: str) -> Source:
    """Open a URL as a source.

    Raises:
        InputError: It cannot be read, or has no shards of tokens and no file of records.
    """
    if data.endswith(ARCHIVE):
        files = _expanded(data)
        return _tar(Storage.of(data.rpartition("/")[0]), files, data, options, wanted=wanted)
    if data.endswith(REMOTE_SUFFIXES):
        files = _expanded(data)
        return Source(_records(Storage.of(data.rpartition("/")[0]), files, data, options))
    storage = Storage.of(data)
    if storage.exists(INDEX):
        return Source(_mosaic(storage, data, options))
    if names := [name for name in storage.folders() if storage.child(name).exists(INDEX)]:
        return _of_splits(storage, names, data, options, wanted=wanted)
    files = storage.files()
    if archives := [file for file in files if file.path.endswith(ARCHIVE)]:
        return _tar(storage, archives, data, options, wanted=wanted)
    found = f"{plural(len(files), 'other file')}" if files else "nothing"
    raise InputError(
        f"{data} has {found}. A URL must have shards of MosaicML Streaming ({INDEX}) or of webdataset ({ARCHIVE}), or "
        f"name a file or pattern of {', '.join(REMOTE_SUFFIXES)}."
    )


def _expanded(data: str) -> list[StoredFile]:
    """Return the files of a name, a pattern or a list.

    Raises:
        InputError: One of them does not exist.
    """
    names = [data]
    if _BRACES.search(data):
        try:
            from braceexpand import braceexpand
        except ImportError:
            raise InputError(
                f"{data} cannot be expanded without the library webdataset. Install it: pip install "
                "'bigbatch[webdataset]'."
            ) from None
        names = list(braceexpand(data))
    found: list[StoredFile] = []
    for name in names:
        storage = Storage.of(name)
        files = storage.files(storage.root if has_wildcard(name) else None)
        if not files:
            raise InputError(f"{name} does not exist." if name != data else f"no file matches {data!r}.")
        found += files
    return found


def _of_splits(storage: Storage, names: Sequence[str], data: str, options: ReadOptions, *, wanted: str) -> Source:
    splits = {split_of_name(name) or name: name for name in names}
    split = choose_split(list(splits), options.split, wanted, data)
    assert split is not None, "there are splits"
    others = [name for found, name in splits.items() if found not in (split, "validation")]
    notes = [f"{data} has other splits, which are not used: {', '.join(others)}"] if others else []
    training = _mosaic(storage.child(splits[split]), data, options, notes)
    validation = None
    if wanted == "train" and split != "validation" and "validation" in splits:
        name = f"the split validation of {data}"
        validation = _mosaic(storage.child(splits["validation"]), name, options)
    return Source(training, validation, has_splits=True)


def _mosaic(storage: Storage, data: str, options: ReadOptions, notes: Sequence[str] = ()) -> Corpus:
    from bigbatch.lm.data.token_shards.mosaic import MosaicShards

    return _corpus(MosaicShards(storage, data), options, notes)


def _tar(storage: Storage, files: Sequence[StoredFile], data: str, options: ReadOptions, *, wanted: str) -> Source:
    from bigbatch.lm.data.token_shards.webdataset_tar import TarShards

    named = [(file, split_of_name(Path(file.path).stem)) for file in files]
    found = list(dict.fromkeys(split for _, split in named if split is not None))
    if options.split is None and (len(found) < 2 or any(split is None for _, split in named)):
        return Source(_corpus(TarShards(storage, data, tuple(files)), options))
    split = choose_split(found, options.split, wanted, data)
    by_split = {name: tuple(file for file, own in named if own == name) for name in found}
    assert split is not None, "there are splits"
    others = [name for name in SPLITS if name in by_split and name not in (split, "validation")]
    notes = [f"{data} has other splits, which are not used: {', '.join(others)}"] if others else []
    training = _corpus(TarShards(storage, data, by_split[split]), options, notes)
    validation = None
    if wanted == "train" and split != "validation" and "validation" in by_split:
        name = f"the split validation of {data}"
        validation = _corpus(TarShards(storage, name, by_split["validation"]), options)
    return Source(training, validation, has_splits=True)


def _corpus(shards: Any, options: ReadOptions, notes: Sequence[str] = ()) -> Corpus:
    from bigbatch.lm.data.token_shards.index import records_note
    from bigbatch.lm.data.token_shards.shards import located_documents, state_of

    def read(reading: Reading) -> Iterator[Document]:
        number = 0
        for _, document in located_documents(shards, reading):
            number += 1
            yield document
        reading.about.append(records_note(shards, number))
        reading.left_out.extend(notes)

    files = [Path(file.path) for file in shards.shards] if shards.storage.is_local else []
    return Corpus(
        read,
        name=shards.name,
        files=files,
        options=options,
        shards=shards if shards.is_in_place else None,
        state=partial(state_of, shards),
    )


def _records(storage: Storage, files: Sequence[StoredFile], data: str, options: ReadOptions) -> Corpus:
    """Return the records of remote files."""

    def read(reading: Reading) -> Iterator[Document]:
        shapes: list[str] = []
        for file in files:
            source = storage.name_of(file.path)
            try:
                with storage.open(file.path) as opened:
                    for document in to_documents(_rows(opened, file.path, source, reading), reading):
                        shapes.append(document.shape)
                        yield document
            except InputError as error:
                reading.skip_file(error, is_only=len(files) == 1)
        reading.about.append(f"{plural(len(shapes), 'record')} in {plural(len(files), 'file')} from {data}")
        reading.about.extend(shape_notes(shapes))

    paths = [Path(file.path) for file in files] if storage.is_local else []
    state = [[file.path, file.size, file.state] for file in files]
    return Corpus(read, name=data, files=paths, options=options, state=lambda: state)


def _rows(file: Any, path: str, source: str, reading: Reading) -> Iterator[tuple[object, str]]:
    suffix = Path(path).suffix
    if suffix in (".jsonl", ".ndjson"):
        return read_json_lines(file, source, reading)
    select = partial(select_columns, source=source, columns=reading.options.columns)
    return read_arrow(file, source, reading, suffix=suffix, select=select)
