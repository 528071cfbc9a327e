"""A source of files: a file, a folder or a pattern, read as text or as records by the names of its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bigbatch.errors import InputError
from bigbatch.lm.data.compression import inner_suffix, open_content
from bigbatch.lm.data.corpus import Corpus
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.folder_files import Listing, expand_pattern, list_folder
from bigbatch.lm.data.hub_folder import LISTED, Selection, select_files, unused_validation_note
from bigbatch.lm.data.reading import Reading, ReadOptions, UnknownShapeError, advised
from bigbatch.lm.data.record_files import RECORD_SUFFIXES, is_known, read_record_file
from bigbatch.lm.data.records import shape_notes
from bigbatch.lm.data.split_names import split_of
from bigbatch.lm.data.text_files import read_text
from bigbatch.lm.text import plural


@dataclass(frozen=True)
class Source:
    """One entry of ``--data``.

    Attributes:
        training: Its documents, or of validation data, those to validate on.
        validation: Its validation split; None if it has none.
        has_splits: Whether ``--split`` selects a part of it.
        has_subsets: Whether ``--subset`` selects a part of it.
    """

    training: Corpus
    validation: Corpus | None = None
    has_splits: bool = False
    has_subsets: bool = False


@dataclass(frozen=True)
class _Files:
    """Files to read in order, with the notes and problems of their selection."""

    data: str
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    is_mixed: bool = False

    def corpus(self, options: ReadOptions) -> Corpus:
        return Corpus(self.read, name=self.data, files=self.files, options=options)

    def read(self, reading: Reading) -> Iterator[Document]:
        """Yield the documents of every file: record files, by suffix, or else text."""
        counts: Counter[str] = Counter()
        shapes: Counter[str] = Counter()
        unknown: list[str] = []
        is_only = len(self.files) == 1
        for problem in self.problems:
            reading.skip_file(InputError(problem))
        for path in self.files:
            is_record_file = inner_suffix(path.name) in RECORD_SUFFIXES
            num_documents = 0
            try:
                for document in _read_file(path, self._name(path), reading):
                    num_documents += 1
                    shapes[document.shape] += 1
                    yield document
            except UnknownShapeError as error:
                if not (self.is_mixed and is_record_file):
                    reading.skip_file(error, is_only=is_only)
                else:
                    unknown.append(self._name(path))
            except InputError as error:
                reading.skip_file(error, is_only=is_only and not num_documents)
                counts["cut files"] += num_documents > 0
            if num_documents and is_record_file:
                counts["records"] += num_documents
                counts["record files"] += 1
            elif num_documents:
                counts["texts"] += 1
        if counts["cut files"]:
            verb = "is" if counts["cut files"] == 1 else "are"
            reading.left_out.append(f"{plural(counts['cut files'], 'broken file')} {verb} used up to the error")
        if counts["texts"]:
            reading.about.append(f"{plural(counts['texts'], 'text file')} from {self.data}")
        if counts["records"]:
            files = plural(counts["record files"], "file")
            reading.about.append(f"{plural(counts['records'], 'record')} in {files} from {self.data}")
        reading.about.extend(shape_notes(shape for shape in shapes.elements() if shape))
        reading.left_out.extend(self.notes)
        if unknown:
            more = f" and {len(unknown) - LISTED:,} more" if len(unknown) > LISTED else ""
            what = plural(len(unknown), "file")
            reading.left_out.append(f"{what} of data without records left out: {', '.join(unknown[:LISTED])}{more}")

    def _name(self, path: Path) -> str:
        """Return the name of a file in messages: as the user named it, or with its path."""
        return self.data if len(self.files) == 1 and Path(self.data) == path else str(path)


def open_file(path: Path, data: str, options: ReadOptions, *, wanted: str) -> Source:
    """Open one file as a source."""
    notes = []
    if wanted == "train":
        split = split_of(path.name)
        if split in ("validation", "test"):
            notes.append(f"{data} is trained on: --data names it, although it is named as the split {split}")
        elif (note := unused_validation_note(path, data)) is not None:
            notes.append(note)
    return Source(_Files(data, (path,), tuple(notes)).corpus(options))


def open_folder(root: Path, data: str, options: ReadOptions, *, wanted: str) -> Source:
    """Open a folder as a source.

    Raises:
        InputError: It has no file to read, or it is not clear which.
    """
    return _open_listing(list_folder(root), root, data, options, wanted=wanted)


def open_pattern(pattern: str, options: ReadOptions, *, wanted: str) -> Source:
    """Open the files that a pattern names as a source. Files of several splits are selected as in a folder.

    Raises:
        InputError: There are none, or it is not clear which to read.
    """
    listing = expand_pattern(pattern)
    root = Path(*_common_parts([path.parent for path in listing.files])) if listing.files else Path()
    return _open_listing(listing, root, pattern, options, wanted=wanted)


def _open_listing(listing: Listing, root: Path, data: str, options: ReadOptions, *, wanted: str) -> Source:
    if listing.problems and not options.skip_broken:
        raise advised(InputError(listing.problems[0]))
    if not listing.files:
        special = next((note for note in listing.notes if "__pycache__" not in note), None)
        why = listing.problems[0] if listing.problems else f"{special}." if special else None
        raise InputError(f"the folder {data} contains no file to train on{f': {why}' if why else '.'}")
    selection = select_files(root, listing.files, data, split=options.split, subset=options.subset, wanted=wanted)
    notes = [*listing.notes, *selection.notes]
    if wanted == "train" and not selection.validation and (note := unused_validation_note(root, data)) is not None:
        notes.append(note)
    training = _Files(data, selection.files, tuple(notes), listing.problems, is_mixed=selection.is_mixed)
    return Source(
        training.corpus(options),
        _validation(selection, data, options),
        has_splits=selection.uses_split,
        has_subsets=options.subset is not None,
    )


def _validation(selection: Selection, data: str, options: ReadOptions) -> Corpus | None:
    if not selection.validation:
        return None
    name = f"the split validation of {data}"
    return _Files(name, selection.validation).corpus(options)


def _read_file(path: Path, source: str, reading: Reading) -> Iterator[Document]:
    if inner_suffix(path.name) in RECORD_SUFFIXES:
        yield from read_record_file(path, source, reading)
        return
    with open_content(path, source) as file:
        yield from read_text(file, source, reading, is_known=partial(is_known, columns=reading.options.columns))


def _common_parts(folders: Sequence[Path]) -> tuple[str, ...]:
    """Return the parts that all paths begin with."""
    common = folders[0].parts
    for folder in folders[1:]:
        same = [one == other for one, other in zip(common, folder.parts, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    return common
