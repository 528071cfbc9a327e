"""Read the card of a dataset, the metadata at the top of its README.md: its subsets and the files of their splits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bigbatch.errors import InputError, first_line

CARD_FIELDS = {
    *("annotations_creators", "configs", "dataset_info", "language", "language_creators", "license", "multilinguality"),
    *("pretty_name", "size_categories", "source_datasets", "task_categories", "task_ids"),
}


@dataclass(frozen=True)
class DeclaredSplits:
    """The files of a subset, and the patterns of its splits; false if the card declares no split.

    Attributes:
        files: Files that belong to the subset.
        prefix: Folder of the subset, with its slash; empty for none.
        patterns: Patterns of the paths of each split.
    """

    files: tuple[str, ...]
    prefix: str = ""
    patterns: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def split_of(self, name: str) -> str | None:
        """Return the split that the card declares for a file; None for none."""
        found = (split for split, patterns in self.patterns.items() if any(_matches(name, p) for p in patterns))
        return next(found, None)

    def unmatched(self, split: str) -> list[str]:
        """Return the patterns of a split that no file matches."""
        patterns = self.patterns.get(split, ())
        return [pattern for pattern in patterns if not any(_matches(name, pattern) for name in self.files)]


def read_card(root: Path, data: str) -> Mapping[str, Any] | None:
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


def declared_splits(
    card: Mapping[str, Any] | None, names: Iterable[str], data: str, *, subset: str | None
) -> DeclaredSplits:
    """Return the files and splits of the subset to read. Without a card, a subset is a folder.

    Raises:
        InputError: The subset does not exist, or there are several and none is given.
    """
    names = tuple(names)
    configs = [config for config in _listed((card or {}).get("configs")) if isinstance(config, dict)]
    if not configs:
        if subset is None:
            return DeclaredSplits(names)
        inside = tuple(name for name in names if name.startswith(f"{subset}/"))
        if not inside:
            folders = ", ".join(sorted({name.partition("/")[0] for name in names if "/" in name})) or "none"
            raise InputError(
                f"{data} has no subset {subset!r}: its dataset card names none, and its folders are {folders}."
            )
        return DeclaredSplits(inside, prefix=f"{subset}/")
    by_name = {str(config.get("config_name")): config for config in configs}
    chosen = _choose(by_name, subset, data)
    folder = str(chosen.get("data_dir") or "").strip("./")
    prefix = f"{folder}/" if folder else ""
    patterns: dict[str, list[str]] = {}
    for entry in _listed(chosen.get("data_files")):
        part = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
        paths = [prefix + str(path).removeprefix("./") for path in _listed(part.get("path"))]
        patterns.setdefault(str(part.get("split")), []).extend(paths)
    return DeclaredSplits(tuple(name for name in names if name.startswith(prefix)), prefix, patterns)


def _choose(by_name: Mapping[str, Mapping[str, Any]], subset: str | None, data: str) -> Mapping[str, Any]:
    names = list(by_name)
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")
    if subset is None and len(names) > 1:
        raise InputError(f"{data} has the subsets {shown}: choose one with --subset, as --subset {names[0]}.")
    if subset is not None and subset not in by_name:
        raise InputError(f"{data} has no subset {subset!r}: it has {shown}.")
    return by_name[names[0] if subset is None else subset]


def _matches(name: str, pattern: str) -> bool:
    return (
        fnmatchcase(name, pattern)
        or fnmatchcase(name, f"{pattern.rstrip('/')}/*")
        or fnmatchcase(name, pattern.replace("**/", ""))
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
