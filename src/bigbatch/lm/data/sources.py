"""Open the data of a run: built-in sources, files, folders, patterns and datasets. No torch, no model library.

data: names → check → built-in source | files | saved dataset | hub → Source: documents to train and to validate on
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bigbatch.errors import InputError, os_reason
from bigbatch.lm.data.compression import COMPRESSIONS
from bigbatch.lm.data.corpus import Corpus
from bigbatch.lm.data.dataset_source import is_saved_dataset, open_hub, open_saved
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.file_source import Source, open_file, open_folder, open_pattern
from bigbatch.lm.data.folder_files import has_wildcard
from bigbatch.lm.data.hub import close_matches, exists, looks_local
from bigbatch.lm.data.python_stdlib import read_standard_library, read_standard_library_functions
from bigbatch.lm.data.reading import DEFAULT_OPTIONS, ReadOptions
from bigbatch.lm.data.record_files import RECORD_SUFFIXES
from bigbatch.lm.data.records import ANY_COLUMNS, RecordColumns
from bigbatch.lm.data.shard_source import (
    ARCHIVE,
    is_archive_list,
    local_path,
    open_archives,
    open_shard_folder,
    open_url,
)
from bigbatch.lm.data.token_shards.storage import check_url, is_url
from bigbatch.lm.files import file_kind

__all__ = ["BUILT_IN", "Corpus", "DataSources", "Document", "ReadOptions", "open_sources", "read_corpus"]

BUILT_IN = {
    "python-stdlib": read_standard_library,
    "python-stdlib-functions": read_standard_library_functions,
}
_LOCAL_SUFFIXES = (*RECORD_SUFFIXES, *COMPRESSIONS, ".txt", ".text", ".md", ".rst", ".py")


@dataclass(frozen=True)
class DataSources:
    """The data of a run.

    Attributes:
        training: Documents to train on: one corpus for each source, in the order given.
        validation: Documents to validate on; none if they are to be held out of the training data.
        notes: What the corpora themselves do not say.
    """

    training: tuple[Corpus, ...]
    validation: tuple[Corpus, ...] = ()
    notes: tuple[str, ...] = ()


def open_sources(
    data: Sequence[str],
    *,
    validation_data: Sequence[str] = (),
    options: ReadOptions = DEFAULT_OPTIONS,
    with_validation: bool = True,
) -> DataSources:
    """Open the data of a run; files are listed and checked, and read when the corpora are iterated over.

    Args:
        data: Sources to train on, each as :func:`read_corpus` accepts it.
        validation_data: Sources to validate on; none for the validation splits of ``data``.
        options: How they are read.
        with_validation: Whether the validation splits of ``data`` are used.

    Raises:
        InputError: A source does not exist or cannot be listed, or the same file is in two of them.
    """
    opened = [_open(name, options, wanted="train") for name in data]
    for flag, value, used in (
        ("--split", options.split, any(source.has_splits for source in opened)),
        ("--subset", options.subset, any(source.has_subsets for source in opened)),
    ):
        if value is not None and not used:
            raise InputError(f"{flag} {value} does nothing: {' and '.join(data)} has no {flag[2:]}s. Leave it out.")
    training = tuple(source.training for source in opened)
    splits = tuple(source.validation for source in opened if source.validation is not None)
    notes = []
    if validation_data:
        plain = replace(options, split=None, subset=None)
        validation = tuple(_open(name, plain, wanted="validation").training for name in validation_data)
    else:
        validation = splits if with_validation else ()
    if splits and not (with_validation and not validation_data):
        names = " and ".join(corpus.name for corpus in splits)
        notes.append(f"{names} {'is' if len(splits) == 1 else 'are'} not used")
    elif splits:
        notes.append(f"validation: {' and '.join(corpus.name for corpus in splits)}; nothing is held out of the data")
    _check_disjoint(training, validation)
    return DataSources(training, validation, tuple(notes))


def read_corpus(data: str, *, skip_broken: bool = False, columns: RecordColumns = ANY_COLUMNS) -> Corpus:
    """Return the documents of one source, in an order that depends on the data only.

    Args:
        data: ``python-stdlib`` or ``python-stdlib-functions``; a file of text, which is one document; a file of
            records (:mod:`bigbatch.lm.data.record_files`), each of which is a document (see
            :mod:`bigbatch.lm.data.records`); a folder of such files, read recursively without hidden entries and
            ``__pycache__``, of which only the training files are read if it is laid out like a dataset of the hub
            (:mod:`bigbatch.lm.data.hub_folder`); a pattern of such files; a folder saved by ``datasets``; the name
            of a dataset on the hub; or a folder or URL of shards of tokens, or a URL of records
            (:mod:`bigbatch.lm.data.shard_source`). Of the last three the split ``train`` is read. Files may be
            compressed. Text is UTF-8, with or without a byte-order mark.
        skip_broken: Whether to skip and count broken records and files instead of raising.
        columns: Columns to read records from, if not those of a known shape.

    Raises:
        InputError: ``data`` does not exist or cannot be listed. What cannot be read is raised while the corpus is
            iterated over.
    """
    return _open(data, ReadOptions(skip_broken=skip_broken, columns=columns), wanted="train").training


def check_data_path(data: str) -> None:
    """Check that ``data`` is built in, a file, a folder or a URL, or can be a name on the hub.

    No request, nothing is read.

    Raises:
        InputError: It is none of them.
    """
    data = local_path(data)
    path = Path(data)
    if data in BUILT_IN:
        return
    if is_url(data):
        check_url(data)
    elif not data or not exists(path):
        if not has_wildcard(data) and not is_archive_list(data):
            _hub_name(data)
    elif not path.is_dir() and not path.is_file():
        raise InputError(
            f"{data} is {file_kind(path)}, but --data needs a regular file or a folder. Copy its content into a file."
        )


def _open(data: str, options: ReadOptions, *, wanted: str) -> Source:
    check_data_path(data)
    if data in BUILT_IN:
        return Source(BUILT_IN[data]())
    data = local_path(data)
    path = Path(data)
    try:
        if is_url(data):
            return open_url(data, options, wanted=wanted)
        if is_archive_list(data) or (data.endswith(ARCHIVE) and (has_wildcard(data) or path.is_file())):
            return open_archives(data, options, wanted=wanted)
        if not data or not exists(path):
            if has_wildcard(data):
                return open_pattern(data, options, wanted=wanted)
            return open_hub(_hub_name(data), options, wanted=wanted)
        if path.is_file():
            return open_file(path, data, options, wanted=wanted)
        if is_saved_dataset(path):
            return open_saved(path, data, options, wanted=wanted)
        if (shards := open_shard_folder(path, data, options, wanted=wanted)) is not None:
            return shards
        return open_folder(path, data, options, wanted=wanted)
    except OSError as error:
        raise InputError(f"cannot read {error.filename or data}: {os_reason(error)}.") from None


def _check_disjoint(training: Sequence[Corpus], validation: Sequence[Corpus]) -> None:
    """Raise if a file is read twice: in two sources, or to train and to validate on."""
    seen: dict[str, Corpus] = {}
    for corpus in (*training, *validation):
        for path in corpus.files:
            other = seen.setdefault(os.path.realpath(path), corpus)
            if other is corpus:
                continue
            where = f"{other.name} and {corpus.name}" if other.name != corpus.name else f"{corpus.name}, given twice"
            what = "trained on and validated on" if corpus in validation and other in training else "read twice"
            raise InputError(f"{path} would be {what}: it is in {where}. Leave it out of one of them.")


def _hub_name(data: str) -> str:
    """Return ``data`` if it can be the name of a dataset; refuse one that looks like a path or a misspelled name."""
    near = close_matches(data, BUILT_IN)
    if not looks_local(data) and Path(data).suffix.lower() not in _LOCAL_SUFFIXES and not near:
        return data
    remedy = f"Did you mean {' or '.join(near)}?" if near else f"The built-in sources are {' and '.join(BUILT_IN)}."
    if all(part in BUILT_IN or (part and exists(Path(part))) for part in data.split(",")):
        remedy = f"Separate several sources with spaces: --data {' '.join(data.split(','))}."
    raise InputError(f"there is no file or folder {data!r}. {remedy}")
