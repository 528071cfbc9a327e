"""Read a corpus from a built-in source, a file, a folder or the hub. No torch, no model library.

data: str → built-in source | text files | record files | saved dataset | hub → Corpus
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bigbatch.errors import InputError, first_line, os_reason
from bigbatch.lm.data.documents import Corpus, Document
from bigbatch.lm.data.hub import close_matches, exists, is_on_hub, looks_local
from bigbatch.lm.data.hub_folder import select_training_files, unused_splits_note, unused_validation_note
from bigbatch.lm.data.messages import NO_TOKEN
from bigbatch.lm.data.python_stdlib import read_standard_library, read_standard_library_functions
from bigbatch.lm.data.record_files import RECORD_SUFFIXES, decode_utf8, read_records
from bigbatch.lm.data.records import ANY_COLUMNS, RecordColumns, rows_to_documents, shape_notes
from bigbatch.lm.files import file_kind
from bigbatch.lm.text import plural

__all__ = ["BUILT_IN", "Corpus", "Document", "read_corpus"]

BUILT_IN = {
    "python-stdlib": read_standard_library,
    "python-stdlib-functions": read_standard_library_functions,
}
_LOCAL_SUFFIXES = (*RECORD_SUFFIXES, ".txt", ".text", ".md", ".rst", ".py", ".json", ".csv")


def read_corpus(data: str, *, skip_broken: bool = False, columns: RecordColumns = ANY_COLUMNS) -> Corpus:
    """Return every document of ``data``, in an order that depends on the data only.

    Args:
        data: ``python-stdlib`` or ``python-stdlib-functions``; a file of text, which is one document; a ``.jsonl`` or
            ``.parquet`` file, each record of which is a document (see
            :mod:`bigbatch.lm.data.records`); a folder of such files, read recursively without
            hidden entries and ``__pycache__``, of which only the training files are read if it is laid out like a
            dataset of the hub (:mod:`bigbatch.lm.data.hub_folder`); a folder saved by ``datasets``; or the name of a
            dataset on the hub. Of the last two the split ``train`` is read. Text is UTF-8, with or without a
            byte-order mark.
        skip_broken: Whether to skip and count invalid records instead of raising.
        columns: Columns to read records from, if not those of a known shape.

    Raises:
        InputError: ``data`` does not exist, cannot be read, is empty, or has a document without training tokens.
    """
    if data in BUILT_IN:
        return BUILT_IN[data]()
    broken: list[str] | None = [] if skip_broken else None
    corpus = _read(data, broken, columns)
    if not broken:
        return corpus
    note = f"{plural(len(broken), 'broken record')} left out; the first: {broken[0]}"
    return replace(corpus, notes=(*corpus.notes, note), left_out=(*corpus.left_out, note))


def check_data_path(data: str) -> None:
    """Check that ``data`` is built in, a file or a folder, or can be a name on the hub. No request, nothing is read.

    Raises:
        InputError: It is none of them.
    """
    path = Path(data)
    if data in BUILT_IN:
        return
    if not data or not exists(path):
        _hub_name(data)
    elif not path.is_dir() and not path.is_file():
        raise InputError(
            f"{data} is {file_kind(path)}, but --data needs a regular file or a folder. Copy its content into a file."
        )


def _read(data: str, broken: list[str] | None, columns: RecordColumns) -> Corpus:
    check_data_path(data)
    path = Path(data)
    if not data or not exists(path):
        return _read_hub(_hub_name(data), broken, columns)
    try:
        if path.is_dir():
            read = _read_saved_dataset if _is_saved_dataset(path) else _read_folder
            return read(path, data, broken, columns)
        note = unused_validation_note(path, data)
        return _read_files([(path, data)], data, [] if note is None else [note], broken, columns)
    except OSError as error:
        raise InputError(f"cannot read {error.filename or data}: {os_reason(error)}.") from None


def _read_folder(root: Path, data: str, broken: list[str] | None, columns: RecordColumns) -> Corpus:
    files: list[Path] = []
    special: list[Path] = []
    left_out = 0

    def raise_error(error: OSError) -> None:
        raise error  # os.walk would skip a folder that it cannot read

    for folder, folders, names in os.walk(root, onerror=raise_error):
        here = Path(folder)
        entries = {name: not name.startswith(".") and name != "__pycache__" for name in (*folders, *names)}
        linked = [name for name in folders if entries[name] and (here / name).is_symlink()]
        if linked:
            raise InputError(f"{here / linked[0]} is a link to a folder. Pass the folder itself, or remove the link.")
        left_out += sum(not included for included in entries.values())
        folders[:] = [name for name in folders if entries[name]]
        for path in (here / name for name in sorted(names) if entries[name]):
            # A pipe or a device is never opened: reading it may wait for ever. A broken link is an error below.
            (files if path.is_file() or not path.exists() else special).append(path)
    notes = []
    if left_out:
        notes.append(f"{left_out:,} hidden or __pycache__ {'entry' if left_out == 1 else 'entries'} left out")
    if len(special) == 1:
        notes.append(f"{special[0]} is {file_kind(special[0])} and is left out")
    elif special:
        example = f"{special[0]}, {file_kind(special[0])}"
        notes.append(f"{len(special):,} entries that are not regular files are left out, such as {example}")
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    if not files:
        raise InputError(f"the folder {data} contains no file to train on{'' if not special else ': ' + notes[-1]}.")
    files, more = select_training_files(root, files, data)
    if (unused := unused_validation_note(root, data)) is not None:
        more.append(unused)
    return _read_files([(path, str(path)) for path in files], data, [*notes, *more], broken, columns)


def _read_files(
    files: list[tuple[Path, str]], data: str, notes: list[str], broken: list[str] | None, columns: RecordColumns
) -> Corpus:
    """Read (path, name in messages) pairs: record files, by suffix, or else text."""
    documents: list[Document] = []
    texts = 0
    records: Counter[str] = Counter()
    for path, source in files:
        if path.suffix.lower() in RECORD_SUFFIXES:
            read = list(read_records(path, source, broken=broken, columns=columns))
            if not read:
                raise InputError(broken[0] if broken else f"{source} is empty: it {NO_TOKEN}.")
            records[source] += len(read)
            documents += read
        else:
            documents.append(Document(source, text=_read_text(path, source)))
            texts += 1
    about = []
    if texts:
        about.append(f"{plural(texts, 'text file')} from {data}")
    if records:
        about.append(f"{plural(records.total(), 'record')} in {plural(len(records), 'file')} from {data}")
    about += shape_notes(document.shape for document in documents)
    return Corpus(tuple(documents), (*about, *notes), tuple(notes))


def _read_text(path: Path, source: str) -> str:
    data = path.read_bytes()
    if not data:
        raise InputError(f"{source} is empty: it {NO_TOKEN}.")
    text = decode_utf8(data, source).removeprefix("\ufeff")
    if not text.strip():
        raise InputError(f"{source} contains only white space: it {NO_TOKEN}.")
    return text


def _is_saved_dataset(folder: Path) -> bool:
    has = {name: (folder / name).is_file() for name in ("state.json", "dataset_info.json", "dataset_dict.json")}
    return has["dataset_dict.json"] or (has["state.json"] and has["dataset_info.json"])


def _read_saved_dataset(folder: Path, data: str, broken: list[str] | None, columns: RecordColumns) -> Corpus:
    import datasets
    import pyarrow as pa

    for path in folder.rglob("*"):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise InputError(f"the saved dataset {data} contains {path.name}, {file_kind(path)}. Remove it.")
    try:
        loaded: Any = datasets.load_from_disk(str(folder))
        others: list[str] = []
        if isinstance(loaded, datasets.DatasetDict):
            if "train" not in loaded:
                raise InputError(f"the saved dataset {data} has no split 'train'; it has {', '.join(loaded)}.")
            others = [split for split in loaded if split != "train"]
            loaded = loaded["train"]
        return _from_dataset(loaded, data, f"the saved dataset {data}", broken, columns, others=others)
    except (FileNotFoundError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the saved dataset {data} cannot be read: {first_line(error)}.") from None


def _read_hub(name: str, broken: list[str] | None, columns: RecordColumns) -> Corpus:
    import datasets
    from huggingface_hub.constants import HF_HUB_OFFLINE

    # In offline mode datasets reads its cache and fails at once; otherwise it would retry for half a minute.
    if not is_on_hub(name, "dataset") and not HF_HUB_OFFLINE:
        raise InputError(
            f"there is no file or folder {name!r}, and the hub cannot be reached to look for a dataset of that name. "
            "Check the path or the network; HF_HUB_OFFLINE=1 reads datasets that were downloaded before."
        )
    try:
        loaded = datasets.load_dataset(name, split="train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"{name!r} is not a path on this machine and cannot be loaded from the hub: {first_line(error)}."
        ) from None
    others = [split for split in loaded.info.splits or () if split != "train"]
    return _from_dataset(loaded, name, f"the hub's dataset {name}, split train", broken, columns, others=others)


def _from_dataset(
    dataset: Any,
    source: str,
    about: str,
    broken: list[str] | None,
    columns: RecordColumns,
    *,
    others: Sequence[str] = (),
) -> Corpus:
    names: list[str] = dataset.column_names
    rows = dataset.select_columns(columns.needed(names))
    documents = tuple(rows_to_documents(rows, names, source, broken=broken, columns=columns))
    if not documents:
        raise InputError(broken[0] if broken else f"{about} is empty: it {NO_TOKEN}.")
    shapes = shape_notes(document.shape for document in documents)
    unused = (unused_splits_note([f"the split {split}" for split in others]),) if others else ()
    return Corpus(documents, (f"{plural(len(documents), 'record')} of {about}", *shapes, *unused), unused)


def _hub_name(data: str) -> str:
    """Return ``data`` if it can be the name of a dataset; refuse one that looks like a path or a misspelled name."""
    near = close_matches(data, BUILT_IN)
    if not looks_local(data) and Path(data).suffix.lower() not in _LOCAL_SUFFIXES and not near:
        return data
    remedy = f"Did you mean {' or '.join(near)}?" if near else f"The built-in sources are {' and '.join(BUILT_IN)}."
    raise InputError(f"there is no file or folder {data!r}. {remedy}")
