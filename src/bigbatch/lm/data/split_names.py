"""Splits of a dataset in the names of its files and folders, and files that are missing from a series."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bigbatch.lm.data.compression import inner_name, inner_suffix
from bigbatch.lm.data.record_files import RECORD_SUFFIXES

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
TEXT_SUFFIXES = (".txt", ".text")
DATA_SUFFIXES = (*RECORD_SUFFIXES, *TEXT_SUFFIXES)
SPLIT_OF_NAME = {word: split for split, words in SPLITS.items() for word in words}
_WORD = "|".join(SPLIT_OF_NAME)
_IN_TABLE_NAME = re.compile(rf"(?:^|[-._ ])({_WORD})(?=[-._ \d]|$)", re.IGNORECASE)
_WHOLE_TEXT_NAME = re.compile(rf"(?:.+\.)?({_WORD})([-._ ]?\d+(-of-\d+)?)?", re.IGNORECASE)
_PART = re.compile(r"(.*?)(\d+)(-of-(\d+)\b.*)")


def split_of(name: str) -> str | None:
    """Return ``"train"``, ``"validation"`` or ``"test"`` for a file, by its path in the folder; None for others.

    The names of tables and records may contain the split as a word; that of a text must be the split alone, or end with
    it, as ``corpus.train.txt``.
    """
    file = name.rpartition("/")[2]
    suffix = inner_suffix(file)
    if suffix not in DATA_SUFFIXES:
        return None
    stem = Path(inner_name(file)).stem
    match = _IN_TABLE_NAME.search(stem) if suffix in RECORD_SUFFIXES else _WHOLE_TEXT_NAME.fullmatch(stem)
    return split_of_folder(name) if match is None else SPLIT_OF_NAME[match[1].lower()]


def split_of_name(name: str) -> str | None:
    """Return the split that the name of a shard or of a folder of shards has as a word; None for others."""
    match = _IN_TABLE_NAME.search(name)
    return None if match is None else SPLIT_OF_NAME[match[1].lower()]


def split_of_folder(name: str) -> str | None:
    """Return the split of the folders that a file is in, by its path; None if they have none."""
    folders = (folder.lower() for folder in name.split("/")[:-1])
    return next((SPLIT_OF_NAME[folder] for folder in folders if folder in SPLIT_OF_NAME), None)


def named_like_splits(names: Sequence[str]) -> list[str]:
    """Return folders and files with the name of a split, if one is that of the training split and another is not.

    Files of any kind count if the word is one of several parts, as in ``wiki.train.tokens``: ``train.py`` is a program.
    """
    found: dict[str, str] = {}
    for name in names:
        *folders, file = name.split("/")
        parts = [part for part in file.lower().split(".")[:-1] if part in SPLIT_OF_NAME]
        if (split := split_of_folder(name)) is not None:
            place = next(i for i, folder in enumerate(folders) if folder.lower() in SPLIT_OF_NAME)
            found.setdefault("/".join(folders[: place + 1]) + "/", split)
        elif parts and file.count(".") > 1:
            found.setdefault(name, SPLIT_OF_NAME[parts[-1]])
    return list(found) if {"train"} < set(found.values()) else []


def missing_parts(names: Sequence[str], data: str) -> list[str]:
    """Return a note for each series of files, as ``train-00000-of-00002.parquet``, of which some are missing."""
    series: dict[tuple[str, str, int], set[int]] = {}
    for name in names:
        if match := _PART.fullmatch(name):
            before, number, after, total = match.groups()
            series.setdefault((before, after, int(total)), set()).add(int(number))
    return [
        f"{data} has {len(numbers):,} of the {total:,} files {before}*{after}: the others are missing"
        for (before, after, total), numbers in series.items()
        if len(numbers) < total
    ]
