"""Select the files of a folder that is laid out like a dataset of the hub: those of one split and subset.

    README.md with a dataset card, data/train-00000-of-00001.parquet, data/test-…   → train: train-…
    train.csv, validation.csv, test.csv                                             → train: train.csv, validation: …
    data.jsonl, README.md, LICENSE                                                  → train: data.jsonl
    train.jsonl, test.jsonl, load.py                                                → train: train.jsonl
    a.txt, README.md; app.py, test/data.json, README.md                             → all: a folder of texts

Splits are recognized by the names of files and folders, or as the card declares them, as the library datasets does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bigbatch.errors import InputError
from bigbatch.lm.data.compression import inner_suffix
from bigbatch.lm.data.dataset_card import DeclaredSplits, declared_splits, read_card
from bigbatch.lm.data.record_files import RECORD_SUFFIXES
from bigbatch.lm.data.split_names import (
    DATA_SUFFIXES,
    SPLIT_OF_NAME,
    SPLITS,
    TEXT_SUFFIXES,
    missing_parts,
    named_like_splits,
    split_of,
    split_of_folder,
)
from bigbatch.lm.text import plural

LISTED = 5  # files that a note names
_ABOUT = re.compile(
    r"(readme|license|licence|copying|citation|notice|changelog)\b.*|dataset_infos?\.json", re.IGNORECASE
)
_SHARD = re.compile(r"data/(\w[\w.]*)-\d{5}-of-\d{5}\b.*")


@dataclass(frozen=True)
class Selection:
    """The files of a folder to read.

    Attributes:
        files: Those of the split.
        validation: Those of the validation split; none if it is the split itself.
        notes: Notes about the files left out.
        is_mixed: Whether the folder has other files than data, such as code, and no dataset card: then a file of
            records without known records is a text among others, and is left out.
        uses_split: Whether the files are those of a split.
    """

    files: tuple[Path, ...]
    validation: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    is_mixed: bool = False
    uses_split: bool = False


def select_files(
    root: Path,
    files: Sequence[Path],
    data: str,
    *,
    split: str | None = None,
    subset: str | None = None,
    wanted: str = "train",
) -> Selection:
    """Return the files of a folder to read.

    Args:
        root: The folder.
        files: Its files, hidden ones excluded.
        data: Name of the folder in messages.
        split: The split to read; None for ``wanted``.
        subset: The subset; None if there is only one.
        wanted: ``train`` or ``validation``.

    Raises:
        InputError: It has splits or subsets, and it is not clear which of its files to read.
    """
    names = {path.relative_to(root).as_posix(): path for path in files}
    card = read_card(root, data)
    declared = declared_splits(card, names, data, subset=subset)
    content = [name for name in declared.files if not _ABOUT.fullmatch(Path(name).name)]
    suffixes = {inner_suffix(name) for name in content}
    splits = _splits(declared, () if suffixes & set(RECORD_SUFFIXES) else content)
    found = list(dict.fromkeys(splits.values()))
    is_data_alone = suffixes <= set(DATA_SUFFIXES)  # code next to data.json is a folder of texts
    is_dataset = card is not None or (is_data_alone and not suffixes <= set(TEXT_SUFFIXES))
    others = [name for name in content if inner_suffix(name) in DATA_SUFFIXES and name not in splits]
    has_splits = {"train"} < set(found) and (is_data_alone or not others)
    chosen_split = None
    if is_dataset or has_splits or split is not None:
        _check_declared(declared, split or wanted, data)
        chosen_split = choose_split(found, split, wanted, data, others=others)
    if chosen_split is not None and (split is not None or card is not None or len(found) > 1):
        chosen = [name for name in splits if splits[name] == chosen_split]
    elif is_dataset:
        chosen = [name for name in content if inner_suffix(name) in DATA_SUFFIXES] or content
    else:
        chosen = list(declared.files)
    if not chosen:
        raise InputError(f"the folder {data} contains no file to train on, only its description.")
    uses_split = chosen_split is not None and {splits.get(name) for name in chosen} == {chosen_split}
    has_validation = uses_split and chosen_split != "validation"
    validation = [name for name in splits if splits[name] == "validation"] if has_validation else []
    used = {*chosen, *validation}
    left_out = [name for name in names if name not in used]
    notes = _notes(data, len(chosen), chosen_split if len(found) > 1 else None, left_out)
    notes += missing_parts([*chosen, *validation], data)
    if has_validation and (patterns := declared.unmatched("validation")):
        notes.append(f"{data} has no file {_some(patterns)}, which its dataset card names for the split validation")
    if not uses_split and (similar := named_like_splits(content)):
        verb = "is" if len(similar) == 1 else "are"
        notes.append(f"{data} is read as one set, although {_listed_names(similar)} {verb} named like splits")
    texts = [] if is_dataset or uses_split else [name for name in chosen if _ABOUT.fullmatch(Path(name).name)]
    if texts:
        notes.append(f"{data} is read as a folder of texts, {_listed_names(texts)} included")
    return Selection(
        tuple(names[name] for name in chosen),
        tuple(names[name] for name in validation),
        tuple(notes),
        is_mixed=not is_dataset,
        uses_split=uses_split,
    )


def unused_validation_note(path: Path, data: str) -> str | None:
    """Return a note if a training file or folder has a validation split next to it, which is not used."""
    name = path.name if path.is_file() else f"{path.name}/all.txt"
    if split_of(name) != "train":
        return None
    siblings: list[Path] = []
    with suppress(OSError):  # a folder that cannot be listed
        siblings = sorted(path.absolute().parent.iterdir())
    for sibling in siblings:
        same_kind = sibling.is_file() == path.is_file() and sibling.suffix == path.suffix
        if same_kind and split_of(sibling.name if path.is_file() else f"{sibling.name}/all.txt") == "validation":
            other = Path(data).parent / sibling.name
            return f"{sibling.name} next to {data} is not used: pass --validation-data {other} to validate on it"
    return None


def choose_name(names: Sequence[str], given: str | None, *, kind: str, data: str) -> str | None:
    """Return the subset that is read: the one given, or the only one; None if there are none.

    Raises:
        InputError: It does not exist, or there are several and none is given.
    """
    flag = f"--{kind}"
    if given is None:
        if len(names) > 1:
            raise InputError(f"{data} has the {kind}s {_some(names)}: choose one with {flag}, as {flag} {names[0]}.")
        return names[0] if names else None
    if given not in names:
        has = f"it has {_some(names)}" if names else "it has none"
        raise InputError(f"{data} has no {kind} {given!r}: {has}.")
    return given


def choose_split(
    found: Sequence[str], split: str | None, wanted: str, data: str, *, others: Sequence[str] = ()
) -> str | None:
    """Return the split to read; None if there is none.

    Args:
        found: The splits that there are.
        split: The one asked for.
        wanted: ``train`` or ``validation``: what is read if none is asked for.
        data: Name of the data in messages.
        others: Files of data that belong to no split.

    Raises:
        InputError: It does not exist, or it is not clear which.
    """
    if split is not None:
        return choose_name(found, split, kind="split", data=data)
    if wanted in found or not found:
        return wanted if found else None
    if len(found) == 1 and (wanted == "validation" or found[0] not in SPLITS):
        return found[0]
    names = f"the split {found[0]}" if len(found) == 1 else f"the splits {_some(found)}"
    if wanted != "train":
        remedy = "pass the files of one"
    elif others:
        remedy = f"pass the files to train on by their paths, as {Path(data) / others[0]}, or choose one with --split"
    else:
        remedy = f"choose one with --split, as --split {min(found, key=_rank)}"
    raise InputError(f"{data} has {names} and none of the name {wanted}: {remedy}.")


def _rank(split: str) -> int:
    """Return how unlikely it is that a split is meant to be trained on."""
    return 0 if split.startswith("train") else 2 if split.startswith("test") else 1


def _check_declared(declared: DeclaredSplits, split: str, data: str) -> None:
    """Raise if files that the card names for the split to read are missing."""
    if patterns := declared.unmatched(split):
        raise InputError(
            f"the dataset card of {data} names {_some(patterns)} for the split {split}, and no such file is there. "
            "Download the missing files, correct README.md, or pass the files to read."
        )


def _splits(declared: DeclaredSplits, texts: Sequence[str]) -> dict[str, str]:
    """Return the split of each file that has one.

    Args:
        declared: Of the card.
        texts: Files that have the split of their folder, whatever their suffix.
    """
    named = ((name, declared.split_of(name) or _split_of(name, declared)) for name in declared.files)
    splits = {name: found for name, found in named if found is not None}
    if splits and not declared:
        by_folder = ((name, split_of_folder(name)) for name in texts if name not in splits)
        splits |= {name: found for name, found in by_folder if found is not None}
    return splits


def _split_of(name: str, declared: DeclaredSplits) -> str | None:
    """Return the split of a file by its name, if the card declares none."""
    if declared:
        return None
    inside = name.removeprefix(declared.prefix)
    shard = _SHARD.fullmatch(inside)
    if shard is not None and inner_suffix(name) in DATA_SUFFIXES:
        return SPLIT_OF_NAME.get(shard[1].lower(), shard[1])
    return split_of(inside)


def _notes(data: str, num_chosen: int, split: str | None, left_out: Sequence[str]) -> list[str]:
    if not left_out:
        return []
    files = plural(num_chosen, "file" if split else "data file")
    of_split = f" of the split {split}" if split else ""
    verb = "is" if num_chosen == 1 else "are"
    others = _listed_names(left_out)
    return [f"{data} is laid out like a dataset of the hub: only {files}{of_split} {verb} used, not {others}"]


def _listed_names(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED:,} more" if len(names) > LISTED else "")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")
