"""Select the training files of a folder that is laid out like a dataset of the hub.

    README.md with a dataset card, data/train-00000-of-00001.parquet, data/test-…   → the files of the split train
    train.csv, test.csv                                                             → train.csv
    data.jsonl, README.md, LICENSE                                                  → data.jsonl
    a.txt, README.md; app.py, test/data.json, README.md                             → all: a folder of texts

Splits are recognized by the names of files and folders, or as the card declares them, as the library datasets does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from bigbatch.errors import InputError, first_line
from bigbatch.lm.data.record_files import RECORD_SUFFIXES
from bigbatch.lm.text import plural

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
TABLE_SUFFIXES = (*RECORD_SUFFIXES, ".json", ".csv", ".tsv", ".arrow")
TEXT_SUFFIXES = (".txt", ".text")
CARD_FIELDS = {
    *("annotations_creators", "configs", "dataset_info", "language", "language_creators", "license", "multilinguality"),
    *("pretty_name", "size_categories", "source_datasets", "task_categories", "task_ids"),
}
LISTED = 5  # files that a note names
_ABOUT = re.compile(
    r"(readme|license|licence|copying|citation|notice|changelog)\b.*|dataset_infos?\.json", re.IGNORECASE
)
_COMPRESSED = re.compile(r"\.(gz|bz2|xz|zst)$", re.IGNORECASE)
_SPLIT_OF_NAME = {word: split for split, words in SPLITS.items() for word in words}
_WORD = "|".join(_SPLIT_OF_NAME)
_IN_TABLE_NAME = re.compile(rf"(?:^|[-._ ])({_WORD})(?=[-._ \d]|$)", re.IGNORECASE)
_WHOLE_TEXT_NAME = re.compile(rf"({_WORD})([-._ ]?\d+(-of-\d+)?)?", re.IGNORECASE)


def select_training_files(root: Path, files: Sequence[Path], data: str) -> tuple[list[Path], list[str]]:
    """Return the files of a folder to train on, and notes about those left out.

    Args:
        root: The folder.
        files: Its files, hidden ones excluded.
        data: Name of the folder in messages.

    Raises:
        InputError: It has splits or configurations, and it is not clear which of its files are for training.
    """
    names = {path.relative_to(root).as_posix(): path for path in files}
    card = _card(root, data)
    declared = _declared_splits(card, data)
    splits = {name: _declared_split(name, declared) or split_of(name) for name in names}
    found = {split for split in splits.values() if split is not None}
    content = [name for name in names if not _ABOUT.fullmatch(Path(name).name)]
    suffixes = {_suffix(name) for name in content}
    is_data_alone = suffixes <= {*TABLE_SUFFIXES, *TEXT_SUFFIXES}  # code next to data.json is a folder of texts
    has_tables = is_data_alone and not suffixes <= set(TEXT_SUFFIXES)
    if "train" in found and (card is not None or (is_data_alone and len(found) > 1)):
        chosen = [name for name in names if splits[name] == "train"]
    elif found - {"train"} and (card is not None or has_tables):
        example = next(name for name in names if splits[name] is not None)
        raise InputError(
            f"the folder {data} has files of the split {' and '.join(sorted(found))} and none of the split train. Pass "
            f"the files to train on, such as --data {root / example}."
        )
    elif card is not None or has_tables:
        chosen = [name for name in content if _suffix(name) in (*TABLE_SUFFIXES, *TEXT_SUFFIXES)] or content
    else:
        chosen = list(names)
    if not chosen:
        raise InputError(f"the folder {data} contains no file to train on, only its description.")
    used = set(chosen)
    left_out = [name for name in names if name not in used]
    return [names[name] for name in chosen], _notes(data, chosen, left_out, found)


def split_of(name: str) -> str | None:
    """Return ``"train"``, ``"validation"`` or ``"test"`` for a file, by its path in the folder; None for others.

    The names of tables and records may contain the split as a word; that of a text must be the split alone.
    """
    *folders, file = name.split("/")
    suffix = _suffix(name)
    if suffix not in (*TABLE_SUFFIXES, *TEXT_SUFFIXES):
        return None
    stem = _COMPRESSED.sub("", file)[: -len(suffix)]
    match = _IN_TABLE_NAME.search(stem) if suffix in TABLE_SUFFIXES else _WHOLE_TEXT_NAME.fullmatch(stem)
    if match is not None:
        return _SPLIT_OF_NAME[match[1].lower()]
    return next((_SPLIT_OF_NAME[folder.lower()] for folder in folders if folder.lower() in _SPLIT_OF_NAME), None)


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
            return unused_splits_note([f"{sibling.name} next to {data}"])
    return None


def unused_splits_note(names: Sequence[str]) -> str:
    """Return the note that splits of the data are not used."""
    verb = "is" if len(names) == 1 else "are"
    return (
        f"{' and '.join(names)} {verb} not used: validation data is held out of the training data "
        "(--validation-fraction)"
    )


def _notes(data: str, chosen: Sequence[str], left_out: Sequence[str], found: Iterable[str]) -> list[str]:
    if not left_out:
        return []
    listed = ", ".join(left_out[:LISTED]) + (f" and {len(left_out) - LISTED:,} more" if len(left_out) > LISTED else "")
    files = plural(len(chosen), "file") if len(set(found)) > 1 else plural(len(chosen), "data file")
    of_split = " of the split train" if len(set(found)) > 1 else ""
    verb = "is" if len(chosen) == 1 else "are"
    notes = [f"{data} is laid out like a dataset of the hub: only {files}{of_split} {verb} used, not {listed}"]
    if "validation" in found:
        notes.append(unused_splits_note([f"the split validation of {data}"]))
    return notes


def _suffix(name: str) -> str:
    return Path(_COMPRESSED.sub("", name)).suffix.lower()


def _card(root: Path, data: str) -> Mapping[str, Any] | None:
    """Return the metadata of a dataset card, empty if only dataset_infos.json describes the dataset; None for neither.

    Raises:
        InputError: The metadata is not valid YAML.
    """
    readme = root / "README.md"
    text = readme.read_bytes().decode("utf-8", "replace") if readme.is_file() else ""
    match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text.replace("\r\n", "\n"), re.DOTALL)
    fields = set(re.findall(r"^(\w+):", match[1], re.MULTILINE)) if match else set()
    if match is None or not fields & CARD_FIELDS:
        return {} if (root / "dataset_infos.json").is_file() else None
    from huggingface_hub import metadata_load

    try:
        return metadata_load(readme) or {}
    except Exception as error:  # noqa: BLE001  those of YAML
        raise InputError(
            f"the metadata of {data}/README.md is not valid YAML: {first_line(error)}. Pass the files to train on."
        ) from None


def _declared_splits(card: Mapping[str, Any] | None, data: str) -> dict[str, list[str]]:
    """Return the patterns of each split that a card declares.

    Raises:
        InputError: It declares several configurations.
    """
    configs = [config for config in _listed((card or {}).get("configs")) if isinstance(config, dict)]
    if len(configs) > 1:
        names = [str(config.get("config_name")) for config in configs]
        shown = ", ".join(names[:LISTED]) + (", …" if len(names) > LISTED else "")
        raise InputError(
            f"the folder {data} has {len(names)} configurations ({shown}), and a run trains on one of them. Pass the "
            "folder or a file of one with --data."
        )
    declared: dict[str, list[str]] = {}
    for entry in _listed(configs[0].get("data_files")) if configs else []:
        part = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
        declared.setdefault(str(part.get("split")), []).extend(map(str, _listed(part.get("path"))))
    return declared


def _declared_split(name: str, declared: Mapping[str, Sequence[str]]) -> str | None:
    return next((split for split, patterns in declared.items() if any(fnmatch(name, p) for p in patterns)), None)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
